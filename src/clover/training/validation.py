"""Scores on held-out samples while training goes on, and the weights that scored best.

Validation changes nothing that is trained: it draws no random number of the training's, and the
weights are the same, bit for bit, with and without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from clover.core.config import OptimizerConfig
from clover.core.errors import CloverError
from clover.core.files import atomic_path, fingerprint
from clover.core.record_file import sha256_records
from clover.training import processes
from clover.training.checkpoint import TORN

_LOG = logging.getLogger(__name__)
Kept = Literal["last", "best"]


@dataclass(frozen=True)
class Validation:
    """What is measured, how often, and which figure says what is best."""

    every: int
    """Steps from one to the next; the last step has one too."""
    scores: Callable[[], dict[str, float]]
    """Of the module as it is, in evaluation mode. Every process calls it."""
    figure: str
    """Name of the score that decides."""
    is_larger_better: bool
    key: str
    """Fingerprint of training and of the held-out samples: figures of another are no match."""

    @classmethod
    def of(
        cls,
        stage: str,
        config: OptimizerConfig,
        path: Path | None,
        scores_on: Callable[[Path], Callable[[], dict[str, float]]],
        *,
        lacking: str,
        figure: str,
        is_larger_better: bool,
        training: str,
    ) -> Validation | None:
        """Return what a stage's section of the recipe asks for; None where it asks for nothing.

        Args:
            stage: The section's name.
            config: The section.
            path: The held-out records.
            scores_on: Opens them, and returns what measures.
            lacking: Says what is not there where there is no path, and how it is named.
            figure: Name of the score that decides.
            is_larger_better: Of it.
            training: Fingerprint of what is trained, and on what.

        Raises:
            CloverError: something is to be measured, and nothing to measure it on.
        """
        if not config.validate_every:
            return None
        if path is None:
            raise CloverError(
                f"{stage}.validate_every is {config.validate_every}, but there are no held-out "
                f"{lacking}, or set {stage}.validate_every=0"
            )
        scores = scores_on(path)  # first: it says what is wrong with the file
        key = fingerprint([training, sha256_records(path), config.validate_samples])
        return cls(config.validate_every, scores, figure, is_larger_better, key)

    def is_due(self, done: int, steps: int) -> bool:
        """Return whether to validate after `done` of `steps` steps."""
        return done % self.every == 0 or done == steps

    def measure(self, module: nn.Module) -> dict[str, float]:
        """Return the scores; the training's random numbers stay where they are."""
        cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=cuda), torch.no_grad():
            module.eval()
            try:
                return self.scores()
            finally:
                module.train()


class BestWeights:
    """The weights with the best figure so far, in a file of the stage's checkpoint folder.

    Args:
        folder: Of the stage's checkpoints.
        validation: Says what is better. What the file holds of another validation is let go.
    """

    def __init__(self, folder: Path, validation: Validation) -> None:
        self.validation = validation
        self._path = folder / "best.pt"
        self.step = 0
        self.value: float | None = None
        if state := self._read():
            self.step, self.value = int(state["step"]), float(state["value"])

    def _read(self) -> dict[str, Any]:
        if not self._path.exists():
            return {}
        try:
            state: dict[str, Any] = torch.load(self._path, map_location="cpu", weights_only=True)
        except TORN:
            _LOG.warning("%s cannot be read; the best of what comes is kept", self._path)
            return {}
        return state if state["key"] == self.validation.key else {}

    def offer(self, step: int, scores: dict[str, float], module: nn.Module) -> None:
        """Keep these weights if they are better than any before; the first process writes."""
        value = scores[self.validation.figure]
        gain = 0.0 if self.value is None else value - self.value
        is_better = gain > 0 if self.validation.is_larger_better else gain < 0
        if self.value is not None and not is_better:
            return
        self.step, self.value = step, value
        if processes.is_first():
            state = {"key": self.validation.key, "step": step, "value": value}
            with atomic_path(self._path) as partial:
                torch.save({**state, "module": module.state_dict()}, partial)

    def load_into(self, module: nn.Module) -> None:
        """Put the best weights into the module.

        Raises:
            CloverError: the file has gone.
        """
        state = self._read()
        if not state:
            raise CloverError(
                f"{self._path} has gone; the best weights were in it: take keep_weights=last"
            )
        module.load_state_dict(state["module"])


def settle(
    module: nn.Module,
    best: BestWeights,
    *,
    steps: int,
    keep: Kept,
    save_other: Callable[[Kept, dict[str, Any]], None],
) -> dict[str, Any]:
    """Leave in the module the weights that the product shall hold; write the other ones beside it.

    Args:
        module: With the last weights.
        best: With the best ones.
        steps: After which the last ones were taken.
        keep: Which the product shall hold.
        save_other: Writes the module as it then is; told which weights these are.

    Returns:
        Which weights the product holds (`kept`), of which steps the two are, and the best figure.
    """
    found = {
        "last_step": steps,
        "best_step": best.step,
        "best_value": best.value,
        "figure": best.validation.figure,
    }
    if best.value is not None and best.step != steps:
        last = {name: item.clone() for name, item in module.state_dict().items()}
        if keep == "last":
            best.load_into(module)
            save_other("best", {"kept": "best", **found})
            module.load_state_dict(last)
        else:
            save_other("last", {"kept": "last", **found})
            best.load_into(module)
    # What was never validated, for nothing was left to train, has no best weights.
    return {"kept": "last" if best.value is None else keep, **found}


def say_kept(note: dict[str, Any], product: Path, other: Path) -> str:
    """Return which weights a product holds and where the other ones lie, in a line."""
    if note["best_value"] is None:
        return f"{product} holds the last weights; none were validated"
    figure = f"{note['figure']} {note['best_value']:g}"
    if note["best_step"] == note["last_step"]:
        return f"{product} holds the last weights, by validation the best too ({figure})"
    sides = (
        f"the best weights by validation (step {note['best_step']}, {figure})",
        f"the last ones (step {note['last_step']})",
    )
    held, beside = sides if note["kept"] == "best" else sides[::-1]
    return f"{product} holds {held}; {beside} are in {other}"
