"""The demo as its user runs it: with the real models, small and short."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import clover

from .conftest import run_clover

pytestmark = pytest.mark.real


def test_demo_leaves_the_files_that_others_read(demo: Path) -> None:
    out = demo / "clover-demo"
    scores = json.loads((out / "scores.json").read_text())
    for name in ("closed", "open_recall", "seconds"):
        assert scores[name] >= 0
    for name in ("image_gain_closed", "image_gain_open"):
        assert -100 <= scores[name] <= 100
    assert scores["num_closed"] > 0 and scores["num_open"] > 0
    assert scores["dollars"] == 0
    assert set(scores["details"]["views"]) == {"image", "blind", "shuffled", "noise"}
    assert {"colour_only", "question_only", "linear_probe"} <= set(scores["details"]["baselines"])
    assert (out / "model" / "bridge.safetensors").exists()
    assert "<html" in (out / "report.html").read_text()
    origins = {json.loads(line)["origin"] for line in (out / "instructions/hybrid.jsonl").open()}
    assert {"template", "truth"} <= origins


def test_demo_says_that_a_fast_run_means_nothing_and_how_to_go_on(demo: Path) -> None:
    text = (demo / "demo.txt").read_text()
    assert "these scores mean nothing" in text
    assert "clover chat clover-demo/model" in text
    assert "not for diagnosis" in text


def test_a_finished_demo_is_not_run_again(demo: Path) -> None:
    bridge = demo / "clover-demo/model/bridge.safetensors"
    before = bridge.stat().st_mtime_ns
    done = run_clover("demo", "--fast", "--out", "clover-demo", cwd=demo, CLOVER_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert bridge.stat().st_mtime_ns == before
    first = (demo / "demo.txt").read_text().split("closed (accuracy)")[1].splitlines()[1]
    assert first in done.stdout


def test_ask_prints_json_and_the_library_says_the_same(demo: Path) -> None:
    image = "clover-demo/phantom-validation/images/00000.png"
    done = run_clover("ask", "clover-demo/model", image, "Is there necrosis?", "--json", cwd=demo)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert set(answer) >= {"answer", "model", "seconds"}
    model = clover.load(demo / "clover-demo/model")
    assert model.ask(demo / image, "Is there necrosis?").text == answer["answer"]


def test_a_stage_lost_in_between_is_made_again_to_the_same_bytes(
    demo: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "clover-demo"
    shutil.copytree(demo / "clover-demo", copy)
    expected = (copy / "model/bridge.safetensors").read_bytes()
    shutil.rmtree(copy / "model")
    assert not list(copy.glob("checkpoints/*/*")), "a finished stage needs no checkpoint"
    (copy / "scores.json").unlink()
    done = run_clover("demo", "--fast", "--out", "clover-demo", cwd=tmp_path, CLOVER_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert (copy / "model/bridge.safetensors").read_bytes() == expected
