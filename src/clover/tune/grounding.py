"""Before the language model is asked: visual tokens that name the answer in its own words.

A frozen language model is a poor teacher for an untrained bridge: each step costs a pass through
all of it, and for hundreds of steps the gradient says little more than how an answer is spelt. So
the bridge first learns, without that pass, to put the embeddings of the answer's tokens where the
language model will look for the image: cross-entropy over the tokens that answers are made of.
A step costs about a tenth of one through the smallest language model.

# Paper: has no such step and starts with the language model's loss; here it comes first, and is
# switched off by `tune.grounding_steps: 0`. Measured in docs/decisions/0006.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clover.model import Clover
from clover.qformer.bridge import Bridge
from clover.training.objective import Losses
from clover.tune.objective import InstructionBatch, TuneObjective
from clover.vision.dataset import FeatureSet

_MOST_ANSWERS = 50_000  # answers read for the list of tokens; rarer tokens carry no loss


@dataclass
class GroundingObjective:
    """Each visual token predicts the tokens of the answer, given image and question."""

    model: Clover
    data: FeatureSet
    vocabulary: Tensor = field(init=False)
    """Ids of the tokens that answers are made of [V']."""

    def __post_init__(self) -> None:
        answers = {record.answer or "" for record in self.data.records[:_MOST_ANSWERS]}
        ids = {token for answer in answers for token in self.model.language.answer_ids(answer)[:-1]}
        self.vocabulary = torch.tensor(sorted(ids))
        self._column = {int(token): place for place, token in enumerate(self.vocabulary)}
        self._tune = TuneObjective(self.model, self.data)
        device = self.model.device.device
        mean, _ = self.model.language.embedding_statistics()
        self._mean = mean.to(device)
        words = self.model.language.word_embeddings(self.vocabulary.to(device))
        self._words = words.float() - self._mean  # [V', H]

    @property
    def module(self) -> Bridge:
        """The only part that learns."""
        return self.model.bridge

    def num_samples(self) -> int:
        """Return the number of instructions."""
        return self._tune.num_samples()

    def sizes(self) -> None:
        """Rows have one width whatever the answer's length: nothing to bucket."""

    def collate(self, indices: Sequence[int]) -> InstructionBatch:
        """Load the instructions with these indices."""
        return self._tune.collate(indices)

    def targets(self, answers: Sequence[str]) -> Tensor:
        """Return each answer as a distribution over the vocabulary [B, V']."""
        target = torch.zeros(len(answers), len(self.vocabulary))
        for row, answer in enumerate(answers):
            for token in self.model.language.answer_ids(answer)[:-1]:
                if token in self._column:
                    target[row, self._column[token]] = 1.0
        return target / target.sum(dim=1, keepdim=True).clamp_min(1)

    def losses(self, batch: InstructionBatch) -> Losses:
        """Return the summed cross-entropy of the batch, averaged over queries."""
        visual = self.model.visual_prefix(batch.features, batch.questions).float()  # [B, Q, H]
        scores = ((visual - self._mean) @ self._words.t()).log_softmax(dim=-1)  # [B, Q, V']
        target = self.targets(batch.answers).to(scores.device)
        loss = -(target[:, None] * scores).sum(dim=-1).mean(dim=1).sum()
        count = torch.tensor(float(len(batch.answers)), device=scores.device)
        return Losses(loss, count)
