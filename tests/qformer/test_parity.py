"""Against what the published LAVIS classes computed (../shared/reference)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.parity import TOLERANCE, compare, main
from safetensors import safe_open
from safetensors.torch import save_file

STAGE1 = "reference/stage1_seed0.safetensors"


def test_stage_1_agrees_with_the_published_classes(shared: Path) -> None:
    figures = compare(shared / STAGE1)
    assert {"loss", "grad_norm", "grad_norm_nodetach", "itm_logits", "lm_logits"} <= set(figures)
    assert {name: value for name, value in figures.items() if value > TOLERANCE} == {}


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_stage_2_agrees_with_the_published_classes(shared: Path, kind: str) -> None:
    figures = compare(shared / "reference" / f"stage2_{kind}_seed0.safetensors")
    assert {"visual_prefix", "logits", "loss", "grad_norm"} <= set(figures)
    assert {name: value for name, value in figures.items() if value > TOLERANCE} == {}


def test_every_figure_is_one_json_line(shared: Path) -> None:
    lines: list[str] = []
    assert main([str(shared / STAGE1)], echo=lines.append) == 0
    rows = [json.loads(line) for line in lines]
    assert len(rows) > 15 and all(row["ok"] for row in rows)


def test_a_disturbed_weight_makes_the_program_exit_1(shared: Path, tmp_path: Path) -> None:
    with safe_open(str(shared / STAGE1), "pt") as source:
        tensors = {name: source.get_tensor(name).clone() for name in source.keys()}  # noqa: SIM118
        metadata = source.metadata()
    tensors["sd/Qformer.bert.encoder.layer.1.output_query.dense.weight"][0, 0] += 0.05
    broken = tmp_path / "broken.safetensors"
    save_file(tensors, str(broken), metadata=metadata)
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.parity", str(broken)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert any(not json.loads(line)["ok"] for line in done.stdout.splitlines())
