"""Stage 2 as an objective for the loop: image and question in, loss of the answer's words out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clover.model import Clover
from clover.qformer.bridge import Bridge
from clover.training.objective import Losses
from clover.vision.dataset import FeatureSet

_QUESTIONS_AT_ONCE = 4096
"""Questions that are tokenised together to find their words."""


@dataclass(frozen=True)
class InstructionBatch:
    """Image tokens [B, P, E], or [G, P, E] of images that B / G rows each share; B questions and
    answers."""

    features: Tensor
    questions: list[str]
    answers: list[str]


def load_instructions(
    model: Clover, data: FeatureSet, indices: Sequence[int], *, together: int = 1
) -> InstructionBatch:
    """Load these instructions, of which each `together` in a row are about one image."""
    records = [data.records[index] for index in indices]
    return InstructionBatch(
        data.features(indices[::together]),
        [model.question_of(record) for record in records],
        [record.answer or "" for record in records],
    )


@dataclass
class TuneObjective:
    """Cross-entropy of the answer's tokens under the frozen language model."""

    model: Clover
    data: FeatureSet

    @property
    def module(self) -> Bridge:
        """The only part that learns."""
        return self.model.bridge

    def num_samples(self) -> int:
        """Return the number of instructions."""
        return len(self.data.records)

    def sizes(self) -> Sequence[int]:
        """Return the answers' lengths: one long answer would pad a whole batch of short ones."""
        return [
            len(record.answer or "") + len(record.question or "") // 2
            for record in self.data.records
        ]

    def words(self) -> Tensor | None:
        """Return the ids that the Q-Former reads of any question, unique [R]; None when of none."""
        found: set[int] = set()
        asked = sorted({self.model.question_of(record) for record in self.data.records})
        for start in range(0, len(asked), _QUESTIONS_AT_ONCE):
            tokens = self.model.question_tokens(asked[start : start + _QUESTIONS_AT_ONCE])
            if tokens is None:
                return None
            found.update(tokens.ids.flatten().tolist())
        return torch.tensor(sorted(found | {self.model.tokenizer.pad}))

    def names(self, indices: Sequence[int]) -> list[str]:
        """Return the records' ids."""
        return [self.data.records[index].id for index in indices]

    def collate(self, indices: Sequence[int]) -> InstructionBatch:
        """Load the instructions with these indices."""
        return load_instructions(self.model, self.data, indices)

    def losses(self, batch: InstructionBatch) -> Losses:
        """Return summed loss and number of answer tokens."""
        total, count = self.model.loss(batch.features, batch.questions, batch.answers)
        return Losses(total, count)
