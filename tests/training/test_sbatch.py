"""docs/train.sbatch without Slurm: stand-ins for its two commands, everything else is real."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from clover.cli import cli
from clover.core.run import RunFolder
from tiny import Tiny, tiny_recipe
from together import free_port

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "train.sbatch"
SRUN = """#!/bin/sh
exec "$@"
"""
SCONTROL = """#!/bin/sh
echo "$@" >> "$SAID"
if [ "$1" = show ]; then echo 127.0.0.1; echo elsewhere; fi
"""


def test_two_processes_stop_before_the_limit_are_queued_again_and_finish(
    tiny: Tiny, tmp_path: Path
) -> None:
    bin_folder, said, out = tmp_path / "bin", tmp_path / "said", tmp_path / "run"
    bin_folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    recipe = tiny_recipe(tiny.folder, align={"steps": 60, "checkpoint_every": 5})
    (tmp_path / "tiny.yaml").write_text(recipe.to_yaml())
    command = ["bash", str(SCRIPT), "align", "--recipe", str(tmp_path / "tiny.yaml")]
    command += ["--data", str(tiny.captions), "--out", str(out), "--allow-leaks"]
    command += ["--features", str(tiny.folder / "cache"), "--validation", str(tiny.captions)]
    path = [str(bin_folder), str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n[1-2]"}
    environment = {
        **os.environ, **slurm, "PATH": os.pathsep.join(path), "SAID": str(said),
        "PROCESSES_PER_NODE": "2", "RENDEZVOUS_PORT": str(free_port()), "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    def run() -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)

    first = run()
    deadline = time.monotonic() + 200
    while not list(out.glob("checkpoints/align/step-*.pt")):
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    printed, errors = first.communicate(timeout=200)
    assert first.returncode == 0, errors
    assert [line for line in errors.splitlines() if line.startswith("clover:")] == [
        "clover: stopped; the same command continues where it was"
    ]
    assert said.read_text().splitlines() == ["show hostnames n[1-2]", "requeue 77"]
    newest = max(out.glob("checkpoints/align/step-*.pt"))
    state = torch.load(newest, weights_only=True)
    assert len(state["random_others"]) == 1 and 0 < state["step"] < 60
    assert not printed

    second = run()
    printed, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors
    # The first process speaks, of both; nothing was queued again, no step logged twice.
    assert printed.count("records on") == 1 and printed.count("matching_accuracy") == 1
    assert said.read_text().count("requeue") == 1
    assert (out / "align.safetensors").exists()
    steps = [row["step"] for row in RunFolder(out).metrics("align")]
    assert steps == [10, 20, 30, 40, 50, 60]

    # What fails for another reason is not queued again.
    (bin_folder / "srun").write_text("#!/bin/sh\nexit 3\n")
    assert run().wait(60) == 3 and said.read_text().count("requeue") == 1


@pytest.mark.parametrize("verb", ["align", "tune"])
def test_torchrun_takes_none_of_our_options_for_its_own(verb: str) -> None:
    from torch.distributed.run import parse_args

    # Without `--` it finds --run ambiguous, and would say so in place of training.
    options = [option.opts[0] for option in cli.get_command(None, verb).params if option.opts]  # type: ignore[arg-type]
    line = re.search(r"^ *(-m -- clover) ", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
    assert line is not None and len(options) > 8
    found = parse_args(["--standalone", *line[1].split(), verb, *options])
    assert (found.training_script, found.training_script_args) == ("clover", [verb, *options])
