"""Checkpoints written beside the training: the same states, nothing lost, no error swallowed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from clover.align.run import align
from clover.core.errors import CloverError
from clover.training.background import BackgroundWriter
from clover.training.loop import train
from line import Line, job_of
from tiny import Tiny, tiny_recipe

pytestmark = pytest.mark.alone  # forks

SETTINGS = {"steps": 8, "checkpoint_every": 2, "learning_rate": 0.1}


def states(folder: Path) -> dict[str, dict[str, Any]]:
    found = (folder / "checkpoints" / "line").glob("step-*.pt")
    return {path.name: torch.load(path, weights_only=True) for path in found}


def test_each_state_is_the_one_of_its_step_though_training_went_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    train(Line([1.0] * 8), job_of(tmp_path / "plain", **SETTINGS, checkpoint_keep=9))
    seen = threading.Event()
    collate, save, late = Line.collate, torch.save, []

    def counted(self: Line, indices: Sequence[int]) -> torch.Tensor:
        if threading.active_count() > 1:
            seen.set()
        return collate(self, indices)

    def slow(state: object, path: object) -> None:
        # Only when training has gone on is the state written.
        late.append(seen.wait(60))
        save(state, path)

    monkeypatch.setattr(Line, "collate", counted)
    monkeypatch.setattr(torch, "save", slow)
    settings = {**SETTINGS, "checkpoint_keep": 9, "checkpoint_in_background": True}
    torch.manual_seed(0)
    train(Line([1.0] * 8), job_of(tmp_path / "beside", **settings))
    assert late == [True] * 4
    ours, theirs = states(tmp_path / "beside"), states(tmp_path / "plain")
    assert ours.keys() == theirs.keys() and len(ours) == 4
    weights = set()
    for name, state in theirs.items():
        assert torch.equal(ours[name]["module"]["weight"], state["module"]["weight"])
        moments, wanted = (item["optimizer"]["state"][0] for item in (ours[name], state))
        assert moments.keys() == wanted.keys()
        assert all(torch.equal(moments[key], item) for key, item in wanted.items())
        assert torch.equal(ours[name]["random"], state["random"])
        weights.add(float(state["module"]["weight"]))
    assert len(weights) == 4


def test_what_goes_wrong_is_raised_at_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = torch.save, 0

    def full(state: object, path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    objective = Line([1.0] * 8)
    with pytest.raises(CloverError, match=r"step-00000004\.pt: No space left"):
        train(objective, job_of(tmp_path, **SETTINGS, checkpoint_in_background=True))
    # The one before is whole, and nothing half lies beside it.
    folder = tmp_path / "checkpoints" / "line"
    assert [path.name for path in folder.iterdir()] == ["step-00000002.pt"]
    assert calls == 2


def test_the_last_error_is_raised_at_the_end_and_hides_no_other() -> None:
    def fail() -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"), BackgroundWriter() as writer:
        writer.start(fail)
    with pytest.raises(CloverError, match="the loss"), BackgroundWriter() as writer:
        writer.start(fail)
        raise CloverError("the loss is nan")
    # Who asked to stop must know that nothing was saved.
    with pytest.raises(OSError, match="full"), BackgroundWriter() as writer:
        writer.start(fail)
        raise KeyboardInterrupt


def test_the_process_waits_for_what_is_being_written() -> None:
    written = []
    go_on = threading.Event()

    def write() -> None:
        go_on.wait(60)
        written.append("all")

    with BackgroundWriter() as writer:
        writer.start(write)
        assert not written
        go_on.set()
    assert written == ["all"]


def test_killed_inside_a_write_the_earlier_checkpoint_serves(tiny: Tiny, tmp_path: Path) -> None:
    def run(out: Path, **settings: Any) -> bytes:
        recipe = tiny_recipe(
            tiny.folder, align={"steps": 10, "batch_size": 4, "checkpoint_every": 3, **settings}
        )
        align(recipe, captions=tiny.captions, out=out, cache=tiny.folder / "cache")
        return (out / "align.safetensors").read_bytes()

    out = tmp_path / "killed"

    def killed() -> None:
        save, calls = torch.save, 0

        def die(state: object, path: Path) -> None:
            nonlocal calls
            calls += 1
            save(state, path)
            if calls == 2:
                os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        torch.save = die  # type: ignore[assignment]
        run(out, checkpoint_in_background=True)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    folder = out / "checkpoints" / "align"
    assert [path.name for path in folder.glob("step-*")] == ["step-00000003.pt"]
    assert run(out, checkpoint_in_background=True) == run(tmp_path / "undisturbed")
    assert not list(out.glob("checkpoints/align/.*"))
