"""The commands of docs/evaluate.md run as they stand there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from clover.cli import cli

DOCS = Path(__file__).resolve().parents[2] / "docs" / "evaluate.md"


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match("clover (score|report) ", line)]


def test_each_command_runs(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = whole_run / "evaluation"
    shutil.copy(folder / "predictions.jsonl", tmp_path / "predictions.jsonl")
    shutil.copy(folder / "blind.jsonl", tmp_path / "other.jsonl")
    shutil.copytree(whole_run, tmp_path / "clover-demo")
    train = {"question": "What tissue is shown?", "answer": "liver"}
    (tmp_path / "train.jsonl").write_text(json.dumps(train) + "\n")
    monkeypatch.chdir(tmp_path)
    found = commands()
    assert len(found) == 5
    for line in found:
        done = CliRunner().invoke(cli, shlex.split(line)[1:], catch_exceptions=False)
        assert done.exit_code == 0, (line, done.output)
    assert (tmp_path / "items.jsonl").stat().st_size
    assert (tmp_path / "compare.html").stat().st_size
