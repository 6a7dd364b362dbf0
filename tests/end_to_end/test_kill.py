"""The benchmark of fifty kills, with six: `features`, `align` and `tune` twice each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_killed_six_times_every_verb_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.kill", "--kills", "6", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["value"], row["differing_files"], row["left_over"]) == (6, 0, 0)
    assert [row[verb]["kills"] for verb in ("features", "align", "tune")] == [2, 2, 2]
