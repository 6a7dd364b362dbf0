"""A disk that fills: one line that names the file, nothing half-written, and it goes on after."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clover.cli import main
from tiny import Tiny


class Disk:
    """Refuses the write of the `left`-th file on, and lets all be written when `left` is None."""

    left: int | None = None

    def refuse(self) -> None:
        if self.left is not None:
            if self.left == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.left -= 1


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """A disk that takes so many whole files and appended lines, then half of one, then none."""
    disk, replace, opened = Disk(), Path.replace, Path.open

    def _replace(self: Path, target: Any) -> Path:
        disk.refuse()
        return replace(self, target)

    def _open(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode.startswith("a"):
            disk.refuse()
        return opened(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "replace", _replace)
    monkeypatch.setattr(Path, "open", _open)
    yield disk


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


def commands(tiny: Tiny, out: Path, inputs: Path) -> dict[str, list[str]]:
    recipe = inputs / "tiny.yaml"
    recipe.write_text(
        tiny.recipe.model_copy(
            update={"tune": tiny.recipe.tune.model_copy(update={"grounding_steps": 5})}
        ).to_yaml()
    )
    named, cache = ["--recipe", str(recipe)], ["--features", str(tiny.folder / "cache")]
    captions, questions = str(tiny.captions), str(tiny.instructions)
    model = ["tune", *named, "--data", questions, *cache, "--out"]
    return {
        "phantom": ["phantom", str(out / "p"), "--images", "3"],
        "template": ["instruct", "template", captions, "--out", str(out / "t.jsonl")],
        "features": ["features", captions, "--encoder", str(recipe), "--out", str(out / "f")],
        "align": ["align", *named, "--data", captions, *cache, "--out", str(out / "run")],
        "tune": [*model, str(out / "model"), "--run", str(out / "run")],
        "evaluate": [
            *["evaluate", str(inputs / "model"), "--data", questions, *cache],
            *["--out", str(out / "e"), "--controls"],
        ],
    }


def contents(folder: Path) -> dict[str, bytes]:
    """Return what a stage is for: not the bill, the clock or what it resumes from."""
    timed = ("costs.json", "metrics.jsonl", "scores.json")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in timed and path.suffix != ".pt"
    }


@pytest.mark.parametrize("verb", ["phantom", "template", "features", "align", "tune", "evaluate"])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    verb: str, tiny: Tiny, tmp_path: Path, disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("whole", "full"):
        (tmp_path / name).mkdir()
    if verb == "evaluate":
        assert call(*commands(tiny, tmp_path, tmp_path)["tune"]) == 0
    assert call(*commands(tiny, tmp_path / "whole", tmp_path)[verb]) == 0
    capsys.readouterr()
    again = commands(tiny, tmp_path / "full", tmp_path)[verb]
    for room in range(100):
        disk.left = room
        code = call(*again)
        said = capsys.readouterr().err
        disk.left = None
        if code == 0:
            break
        assert code == 2 and said.count("\n") == 1, said
        assert said.startswith("clover: cannot write ") and "No space left on device" in said
        named = Path(said.removeprefix("clover: cannot write ").split(": No space")[0])
        assert named.is_relative_to(tmp_path / "full"), named
        assert not list((tmp_path / "full").rglob(".*")), "something half-written was left"
    assert code == 0 and room > 0, "it never fitted, or was never refused"
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")
