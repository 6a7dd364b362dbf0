"""Stopped anywhere and called again: the same weights, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from clover.align.run import align
from clover.core.config import load_recipe
from clover.core.errors import CloverError
from clover.core.files import fingerprint
from clover.core.record_file import sha256_records
from clover.core.run import RunFolder
from clover.model import load
from clover.training import device
from clover.training.device import choose_device
from stage import STAGES, Stage, run_stage
from tiny import Tiny, tiny_recipe


@pytest.fixture(scope="module")
def unbroken(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[Stage, bytes]:
    """Return each stage's weights after 20 steps in one go."""
    folder = tmp_path_factory.mktemp("unbroken")
    return {stage: run_stage(stage, tiny, folder / stage).read_bytes() for stage in STAGES}


# 24 captions in batches of 4 make 6 steps an epoch, 48 questions make 12.
@pytest.mark.parametrize(
    ("stage", "stops"),
    [
        ("align", [10]),
        ("align", [6]),
        ("align", [3, 12, 19]),
        ("tune", [10]),
        ("tune", [12]),
    ],
)
def test_a_run_in_parts_gives_the_weights_of_a_run_in_one_go(
    stage: Stage, stops: list[int], tiny: Tiny, tmp_path: Path, unbroken: dict[Stage, bytes]
) -> None:
    for stop in stops:
        weights = run_stage(stage, tiny, tmp_path, max_steps=stop)
        assert not weights.exists()
    assert run_stage(stage, tiny, tmp_path).read_bytes() == unbroken[stage]


def test_another_seed_gives_other_weights(
    tiny: Tiny, tmp_path: Path, unbroken: dict[Stage, bytes]
) -> None:
    recipe = tiny.recipe.model_copy(update={"seed": 1})
    assert run_stage("align", tiny, tmp_path, recipe=recipe).read_bytes() != unbroken["align"]


@pytest.mark.parametrize("damage", ["half", "empty", "garbage"])
def test_a_torn_checkpoint_falls_back_to_the_one_before(
    damage: str, tiny: Tiny, tmp_path: Path, unbroken: dict[Stage, bytes]
) -> None:
    run_stage("align", tiny, tmp_path, max_steps=10)
    checkpoints = sorted((tmp_path / "checkpoints" / "align").glob("step-*.pt"))
    assert [path.name for path in checkpoints] == ["step-00000005.pt", "step-00000010.pt"]
    newest = checkpoints[-1]
    whole = newest.read_bytes()
    newest.write_bytes(
        {"half": whole[: len(whole) // 2], "empty": b"", "garbage": b"\x80\x04no" * 999}[damage]
    )
    assert run_stage("align", tiny, tmp_path).read_bytes() == unbroken["align"]
    steps = [row["step"] for row in RunFolder(tmp_path).metrics("align")]
    assert steps == [10, 20]


@pytest.mark.parametrize("stage", STAGES)
def test_other_settings_are_refused_in_one_line(stage: Stage, tiny: Tiny, tmp_path: Path) -> None:
    run_stage(stage, tiny, tmp_path, max_steps=5)
    changed = tiny_recipe(tiny.folder, **{stage: {"learning_rate": 0.01}})
    before = getattr(tiny.recipe, stage).learning_rate
    said = rf"made with other settings \({stage}.learning_rate was {before}, is 0.01\)"
    with pytest.raises(CloverError, match=said) as error:
        run_stage(stage, tiny, tmp_path, recipe=changed)
    assert "\n" not in str(error.value)
    kept = load_recipe(str(tmp_path / "recipe.yaml"))
    assert getattr(kept, stage).learning_rate == before, "the run's own recipe is lost"


def without_an_image(tiny: Tiny, folder: Path) -> Path:
    """Return a copy of the tiny data that lacks one image."""
    shutil.copytree(tiny.folder / "data", folder)
    sorted(folder.rglob("*.png"))[0].unlink()
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_images_that_came_since_are_named_as_what_differs(
    stage: Stage, tiny: Tiny, tmp_path: Path
) -> None:
    fewer = without_an_image(tiny, tmp_path / "data")
    recipe = tiny_recipe(tiny.folder, data={"images": str(fewer)})
    run_stage(stage, tiny, tmp_path / "run", recipe=recipe, max_steps=5)
    with pytest.raises(CloverError, match=r"records with an image was \d+, is \d+, the images"):
        run_stage(stage, tiny, tmp_path / "run")


def test_another_number_format_is_named_as_what_differs(tiny: Tiny, tmp_path: Path) -> None:
    half = tiny.recipe.model_copy(update={"precision": "bfloat16"})
    run_stage("align", tiny, tmp_path, recipe=half, max_steps=5)
    for precision in ("auto", "float32"):
        now = tiny.recipe.model_copy(update={"precision": precision})
        if choose_device("cpu", now.precision).dtype == torch.bfloat16:
            continue
        with pytest.raises(CloverError, match="the number format was bfloat16, is float32"):
            run_stage("align", tiny, tmp_path, recipe=now)
    assert run_stage("align", tiny, tmp_path, recipe=half).exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_training_of_other_settings_is_kept(
    stage: Stage, tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = run_stage(stage, tiny, tmp_path).read_bytes()
    kept = tmp_path / ("earlier" if stage == "align" else "model.earlier")
    run_stage(stage, tiny, tmp_path)
    assert not kept.exists() and not caplog.records
    other = tiny.recipe.model_copy(update={"seed": 1})
    second = run_stage(stage, tiny, tmp_path, recipe=other)
    assert second.read_bytes() != first
    (folder,) = kept.iterdir()
    assert (folder / second.name).read_bytes() == first
    assert f"will be kept in {folder}" in caplog.text
    if stage == "tune":
        assert load(folder).name == tiny.recipe.name  # it can still be asked
    else:
        assert json.loads((folder / "align.json").read_text())["key"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_was_finished_before_images_were_told_apart_still_counts(
    stage: Stage, tiny: Tiny, tmp_path: Path
) -> None:
    weights = run_stage(stage, tiny, tmp_path)
    before = weights.stat().st_mtime_ns
    note = tmp_path / ("align.json" if stage == "align" else "model/config.json")
    sections = ["seed", "precision", "encoder", "qformer", stage]
    data = [sha256_records(tiny.captions)]
    if stage == "tune":
        sections += ["language", "prompt"]
        data = [sha256_records(tiny.instructions), None]
    found = json.loads(note.read_text())
    del found["number_format"]
    found["key"] = fingerprint([tiny.recipe.fingerprint(*sections), *data])
    note.write_text(json.dumps(found))
    run_stage(stage, tiny, tmp_path)
    assert weights.stat().st_mtime_ns == before
    found["key"] = "other"
    note.write_text(json.dumps(found))
    run_stage(stage, tiny, tmp_path)
    assert weights.stat().st_mtime_ns != before


def test_a_finished_training_counts_on_a_machine_of_another_number_format(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = tiny.recipe.model_copy(update={"precision": "auto"})
    monkeypatch.setattr(device, "multiplies_bfloat16_fast", lambda: True)
    weights = run_stage("align", tiny, tmp_path, recipe=free)
    before = weights.stat().st_mtime_ns
    monkeypatch.setattr(device, "multiplies_bfloat16_fast", lambda: False)
    run_stage("align", tiny, tmp_path, recipe=free)
    assert weights.stat().st_mtime_ns == before
    asked = tiny.recipe.model_copy(update={"precision": "float32"})
    run_stage("align", tiny, tmp_path, recipe=asked)
    assert weights.stat().st_mtime_ns != before, "float32 was asked for by name"


def test_other_data_are_named_as_what_differs(tiny: Tiny, tmp_path: Path) -> None:
    run_stage("align", tiny, tmp_path / "run", max_steps=5)
    data = tmp_path / "captions.jsonl"
    data.write_text("\n".join(tiny.captions.read_text().splitlines()[:-1]))
    recipe = tiny_recipe(tiny.folder, data={"images": str(tiny.folder / "data")})
    with pytest.raises(CloverError, match=r"the captions' sha256 was \w+…, is \w+…, the images"):
        align(recipe, captions=data, out=tmp_path / "run", cache=tiny.folder / "cache")


def test_a_finished_stage_is_not_run_again(tiny: Tiny, tmp_path: Path) -> None:
    weights = run_stage("align", tiny, tmp_path)
    before = weights.stat().st_mtime_ns
    run_stage("align", tiny, tmp_path)
    assert weights.stat().st_mtime_ns == before


def test_ctrl_c_saves_and_the_same_command_ends_at_the_same_weights(
    tiny: Tiny, tmp_path: Path
) -> None:
    # Long enough to be caught in the middle; no checkpoint falls due before the end.
    settings = {"steps": 150, "checkpoint_every": 100_000}
    recipe = tiny_recipe(tiny.folder, align=settings)
    (tmp_path / "tiny.yaml").write_text(recipe.to_yaml())
    whole = run_stage("align", tiny, tmp_path / "whole", recipe=recipe)
    out = tmp_path / "stopped"
    command = [sys.executable, "-m", "clover.cli", "align", "--recipe", str(tmp_path / "tiny.yaml")]
    command += ["--data", str(tiny.captions), "--out", str(out)]
    command += ["--features", str(tiny.folder / "cache")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        assert running.poll() is None, "it ended before it trained"
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, message = running.communicate(timeout=120)
    assert running.returncode == 130 and len(message.strip().splitlines()) == 1, message
    assert "continues" in message
    saved = list((out / "checkpoints" / "align").glob("step-*.pt"))
    assert len(saved) == 1 and 0 < int(saved[0].stem[5:]) < 150
    again = run_stage("align", tiny, out, recipe=recipe)
    assert again.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_moment_it_ends_at_the_same_weights(
    stage: Stage, tiny: Tiny, tmp_path: Path
) -> None:
    """SIGKILL after some saves: inside a step, or inside a save, wherever it falls."""
    recipe = tiny_recipe(tiny.folder, **{stage: {"steps": 60, "checkpoint_every": 2}})
    (tmp_path / "tiny.yaml").write_text(recipe.to_yaml())
    whole = run_stage(stage, tiny, tmp_path / "whole", recipe=recipe).read_bytes()
    out = tmp_path / "killed"
    saves = out / "checkpoints" / stage
    # What an earlier kill left half written, and nobody would ever remove.
    saves.mkdir(parents=True)
    (saves / ".step-00000002.pt.abc.part").write_bytes(b"half")
    data = tiny.captions if stage == "align" else tiny.instructions
    command = [sys.executable, "-m", "clover.cli", stage, "--recipe", str(tmp_path / "tiny.yaml")]
    command += ["--data", str(data), "--features", str(tiny.folder / "cache")]
    command += ["--out", str(out)] if stage == "align" else []
    command += ["--out", str(out / "model"), "--run", str(out)] if stage == "tune" else []
    for least in (4, 30):
        running = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and running.poll() is None:
            steps = [int(path.stem[5:]) for path in saves.glob("step-*.pt")]
            if max(steps, default=0) >= least:
                break
            time.sleep(0.005)
        running.kill()
        assert running.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert run_stage(stage, tiny, out, recipe=recipe).read_bytes() == whole
    assert not list(out.glob("checkpoints/*/.*.part"))
