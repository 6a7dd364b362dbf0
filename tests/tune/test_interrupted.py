"""Stopped inside the steps before the language model's: the same command, the same weights."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from clover.core.errors import CloverError
from clover.core.run import RunFolder
from clover.training.loop import Interrupted
from clover.tune.grounding import GroundingObjective
from clover.tune.run import TuneResult, tune
from tiny import Tiny, tiny_recipe

STEPS = {"grounding_steps": 12, "anchoring_steps": 12, "steps": 6, "grounding_batch_size": 4}


def tuned(tiny: Tiny, out: Path, *, max_steps: int | None = None) -> TuneResult:
    # Dropout is on, and no checkpoint falls due inside a stage.
    return tune(
        tiny_recipe(tiny.folder, tune={**STEPS, "checkpoint_every": 1000}),
        instructions=tiny.instructions,
        out=out / "model",
        run=out,
        cache=tiny.folder / "cache",
        max_steps=max_steps,
    )


def run(tiny: Tiny, out: Path) -> bytes:
    found = tuned(tiny, out)
    return (found.model / "bridge.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return run(tiny, tmp_path_factory.mktemp("undisturbed"))


def at_step(
    stop: int, deed: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *, anchored: bool
) -> None:
    """Do something at the `stop`-th batch of one of the two stages, once."""
    collate, seen = GroundingObjective.collate, 0

    def counted(self: GroundingObjective, indices: list[int]) -> object:
        nonlocal seen
        # The refit between the stages collates too, in evaluation mode.
        if bool(self.anchor) == anchored and self.module.training:
            seen += 1
            if seen == stop:
                deed()
        return collate(self, indices)

    monkeypatch.setattr(GroundingObjective, "collate", counted)


@pytest.mark.parametrize("stop", [1, 7, 12])
@pytest.mark.parametrize("stage", ["ground", "anchor"])
def test_ctrl_c_before_the_language_model_is_asked(
    stage: str,
    stop: int,
    tiny: Tiny,
    tmp_path: Path,
    undisturbed: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        press = lambda: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
        at_step(stop, press, patch, anchored=stage == "anchor")
        with pytest.raises(Interrupted, match=f"{stage} stopped after step {stop}"):
            run(tiny, tmp_path)
    saved = [path.name for path in (tmp_path / "checkpoints" / stage).iterdir()]
    assert saved == [f"step-{stop:08d}.pt"]
    assert run(tiny, tmp_path) == undisturbed
    # It went on from there: the first stage was not begun again.
    assert [row["step"] for row in RunFolder(tmp_path).metrics("ground")] == [10, 12]


@pytest.mark.parametrize("stage", ["ground", "anchor"])
def test_a_step_that_fails_loses_no_earlier_stage(
    stage: str,
    tiny: Tiny,
    tmp_path: Path,
    undisturbed: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise CloverError("the power went")

    with monkeypatch.context() as patch:
        at_step(9, fail, patch, anchored=stage == "anchor")
        with pytest.raises(CloverError, match="the power went"):
            run(tiny, tmp_path)
    assert (tmp_path / "checkpoints" / "ground").exists() == (stage == "anchor")
    assert run(tiny, tmp_path) == undisturbed


def test_max_steps_counts_the_language_models_steps_alone(
    tiny: Tiny, tmp_path: Path, undisturbed: bytes
) -> None:
    found = tuned(tiny, tmp_path, max_steps=2)
    assert not found.is_finished and not found.model.exists()
    names = {path.parent.name: path.name for path in tmp_path.glob("checkpoints/*/*.pt")}
    assert names == {
        "ground": "step-00000012.pt",
        "anchor": "step-00000012.pt",
        "tune": "step-00000002.pt",
    }
    assert run(tiny, tmp_path) == undisturbed
