"""The answer loss on held-out questions, with the right image and with another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clover.model import Clover
from clover.qformer.used_words import all_words
from clover.tune.objective import load_instructions
from clover.vision.dataset import FeatureSet

FIGURE = "answer_loss"


@dataclass(frozen=True)
class AnswerLoss:
    """Mean cross-entropy of the answers' tokens, twice."""

    model: Clover
    data: FeatureSet
    batch_size: int

    def __call__(self) -> dict[str, float]:
        """Return both losses, and by how much the right image lowers it."""
        with all_words(self.model.bridge.qformer):
            right, other = self._losses()
        return {
            FIGURE: round(right, 5),
            "answer_loss_other_image": round(other, 5),
            "image_gain": round(other - right, 5),
        }

    @torch.no_grad()
    def _losses(self) -> tuple[float, float]:
        model, others = self.model, other_images(self.data.digests)
        right = wrong = tokens = 0.0
        for start in range(0, len(others), self.batch_size):
            rows = range(start, min(start + self.batch_size, len(others)))
            batch = load_instructions(model, self.data, rows)
            features = self.data.features([others[row] for row in rows])
            with model.device.autocast():
                loss, count = model.loss(batch.features, batch.questions, batch.answers)
                instead, _ = model.loss(features, batch.questions, batch.answers)
            right, wrong = right + float(loss), wrong + float(instead)
            tokens += float(count)
        return right / tokens, wrong / tokens


def other_images(digests: Sequence[str]) -> list[int]:
    """Return for each record the next one, round and round, that is about another image.

    Where all are about one image, the next one.
    """
    size = len(digests)
    chosen = [(row + 1) % size for row in range(size)]
    # From the back: a run of records about one image ends where the next image begins.
    for row in [*range(size)][::-1] * 2:
        after = (row + 1) % size
        chosen[row] = after if digests[after] != digests[row] else chosen[after]
    return chosen
