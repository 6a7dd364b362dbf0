"""The run folder: metrics that survive a crash, and a bill that adds up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from clover.core.errors import CloverError
from clover.core.files import read_json
from clover.core.run import RunFolder, machine, peak_memory_gib


def test_a_stage_in_parts_adds_up_and_the_total_is_the_sum(tmp_path: Path) -> None:
    RunFolder(tmp_path).account("align", seconds=2.0, dollars=0.5)
    run = RunFolder(tmp_path)
    run.account("align", seconds=3.0, dollars=0.25, steps=7)
    run.account("tune", seconds=1.5)
    bill = read_json(tmp_path / "costs.json")
    assert bill["total"] == {"seconds": 6.5, "dollars": 0.75}
    assert [(item["stage"], item["seconds"]) for item in bill["stages"]] == [
        ("align", 5.0),
        ("tune", 1.5),
    ]
    assert bill["stages"][0]["steps"] == 7 and bill["stages"][0]["peak_memory_gib"] > 0


def test_interrupted_work_is_on_the_bill_too(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(KeyboardInterrupt), run.timed("generate") as details:
        details["dollars"] = 0.02
        raise KeyboardInterrupt
    assert run.costs()[0]["dollars"] == 0.02


def test_a_disk_that_takes_no_bill_does_not_hide_what_failed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise CloverError("cannot write costs.json")

    run = RunFolder(tmp_path)
    monkeypatch.setattr("clover.core.run.write_json", full)
    with pytest.raises(CloverError, match="the checkpoint"), run.timed("tune"):
        raise CloverError("cannot write the checkpoint")
    with pytest.raises(CloverError, match="costs"), run.timed("tune"):
        pass


def test_repeated_steps_count_once_and_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.log("align", 10, loss=3.0)
    run.log("align", 20, loss=2.0)
    run.log("align", 20, loss=1.0)
    run.log("tune", 10, loss=5.0)
    with (tmp_path / "metrics.jsonl").open("a") as out:
        out.write('{"stage": "align", "st')
    assert [(row["step"], row["loss"]) for row in run.metrics("align")] == [(10, 3.0), (20, 1.0)]
    assert len(run.metrics()) == 3


def test_the_line_after_a_torn_one_is_not_lost(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.log("align", 10, loss=3.0)
    with (tmp_path / "metrics.jsonl").open("a") as out:
        out.write('{"stage": "align", "st')
    run.log("align", 20, loss=2.0)
    assert [row["step"] for row in run.metrics("align")] == [10, 20]


def test_the_machine_says_what_changes_numbers() -> None:
    assert {"torch", "transformers", "threads", "device"} <= set(machine())
    assert peak_memory_gib() > 0.01


def test_scoring_needs_nothing_that_only_unix_has() -> None:
    script = (
        "import sys; sys.modules['resource'] = sys.modules['fcntl'] = None\n"
        "import clover.evaluate.score\nfrom clover.core.run import peak_memory_gib\n"
        "assert peak_memory_gib() == 0.0\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
