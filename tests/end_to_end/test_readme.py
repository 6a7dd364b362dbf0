"""The README's commands run, in the order they stand there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"


def shell_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_the_readme_shows_a_command_for_each_verb() -> None:
    from clover.cli import VERBS

    shown = set(re.findall(r"clover ([a-z]+)", "\n".join(shell_commands())))
    assert shown | {"demo"} == set(VERBS)


@pytest.mark.real
def test_every_command_of_the_readme_runs(demo: Path) -> None:
    script = shlex.join([sys.executable, "-m", "clover.cli"])
    commands = shell_commands()
    assert len(commands) >= 12
    for command in commands:
        done = subprocess.run(
            re.sub(r"\bclover (?=[a-z])", f"{script} ", command),
            shell=True,
            cwd=demo,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.real
def test_the_python_of_the_readme_runs(demo: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=demo, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
