"""Before the language model is asked: visual tokens that spell the answer in its own words.

A frozen language model is a poor teacher for an untrained bridge: each step costs a pass through
all of it, and for hundreds of steps the gradient says little more than how an answer is spelt. So
the bridge first learns, without that pass, to write the answer where the language model will look
for the image: place q holds the answer's token q, and places behind the answer hold a filler. A
language model that reads `kidney - - -` before a question answers "kidney" without being taught.

Three steps, none of which runs the language model:

1. `GroundingObjective`: cross-entropy over the tokens that answers are made of. It shapes what a
   visual token points at, and leaves its length and its other directions to chance.
2. `refit_projection`: ridge regression from the queries to the words' embeddings, in closed form.
3. `GroundingObjective` with `anchor` above 0: the cross-entropy, and the squared distance to the
   word's embedding, until visual tokens are words as the language model knows them.

# Paper: has no such steps and starts with the language model's loss; here they come first, and are
# switched off by `tune.grounding_steps: 0`. Measured in docs/decisions/0006 and 0007.
"""

from __future__ import annotations

import random
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clover.core.record import Record
from clover.core.record_file import columns
from clover.language.words import Words
from clover.model import Clover
from clover.qformer.bridge import Bridge
from clover.training.objective import Losses
from clover.tune.objective import InstructionBatch, load_instructions
from clover.tune.spelling import Spelling, SpellingKind
from clover.vision.dataset import FeatureSet

_RIDGE = 1e-4
"""Of the refit, per row: hidden rows have about unit variance."""
_REFIT_ROWS = 16_384
"""Query rows that are enough to fit the projection on."""
_MOST_SPELLINGS = 10_000
"""Different answers that a model folder lists; of more, each word stands for itself."""
_MEAN_OF = 256
"""Records whose images are enough for the channels' means."""


@dataclass
class _Asked:
    """Which question and which answer each record has, as numbers: 8 bytes a record."""

    question: Sequence[int]
    """Number of each record's question [N]: equal where the questions are."""
    answer: Sequence[int]
    """Place of each record's answer in `answers` [N]."""
    answers: list[str]
    """The different ones."""

    @classmethod
    def of(cls, records: Sequence[Record]) -> _Asked:
        """Read them in one pass."""
        questions: dict[str | None, int] = {}
        answers: dict[str, int] = {}
        asked, said = array("i"), array("i")
        for question, answer in columns(records, "question", "answer"):
            asked.append(questions.setdefault(question, len(questions)))
            said.append(answers.setdefault(answer or "", len(answers)))
        return cls(asked, said, list(answers))


@dataclass
class GroundingObjective:
    """Each visual token predicts its token of the answer, given image and question."""

    model: Clover
    data: FeatureSet
    together: int = 1
    """Questions about one image that stand together and share its keys."""
    filler: str = " -"
    """One token of the language model, for places behind the answer."""
    anchor: float = 0.0
    """Weight of the squared distance to the word's embedding."""
    spelling: SpellingKind = "whole"
    """Whether an answer is spelt whole, or as far as it differs from every other."""
    tokens_seen: float = 1.0
    """Share of an image's tokens that a training step sees."""
    channels_seen: float = 1.0
    """Share of an image's channels that a training step sees; the others stand at their mean."""
    repeat: int = 1
    """A rare question is asked up to so many times as often, at most as often as the commonest."""
    seed: int = 0
    """Which questions about an image stand together."""
    words: Words = field(init=False)
    """The tokens that answers are made of."""

    def __post_init__(self) -> None:
        self._asked = _Asked.of(self.data.records)
        spelling = Spelling.of(
            self._asked.answers,
            encode=self.model.language.text_tokens,
            num_places=self.num_places,
            filler=self.filler,
            kind=self.spelling,
        )
        self._filler, self._spelt = spelling.filler_id, spelling.ids
        self._fits = [answer in self._spelt for answer in self._asked.answers]
        self._asked.answers.clear()  # long ones are many; those that fit are in `_spelt`
        used = sorted({self._filler}.union(*self._spelt.values()))
        self._column = {token: place for place, token in enumerate(used)}
        self.words = Words.of(
            self.model.language, used, self.model.device.device, self._spellings()
        )
        self.group(self.repeat)
        if self.channels_seen < 1:
            self._channel_means = self._mean_over_images()

    def _spellings(self) -> list[list[int]] | None:
        """Return each different answer as places of its words [A, Q]; None of too many."""
        rows = {tuple(self._places(answer)) for answer in self._spelt}
        return [list(row) for row in sorted(rows)] if 0 < len(rows) <= _MOST_SPELLINGS else None

    def _places(self, answer: str) -> list[int]:
        """Return the row in `words` of each visual token [Q]: the answer's tokens, then fillers."""
        spelt = self._spelt[answer]
        fillers = [self._filler] * (self.num_places - len(spelt))
        return [self._column[token] for token in (*spelt, *fillers)]

    def group(self, repeat: int) -> None:
        """Put questions about one image into groups, rare ones up to `repeat` times."""
        self._groups = self._grouped(repeat)

    def _grouped(self, repeat: int) -> list[list[int]]:
        """Return groups of `together` questions about one image, answers too long left out."""
        chance = random.Random(self.seed)
        asked = np.bincount(self._asked.question)
        times = np.minimum(repeat, asked.max() // np.maximum(asked, 1)).tolist()
        by_image: dict[bytes, list[int]] = defaultdict(list)
        images = np.ascontiguousarray(self.data.digests.values)
        for index, (question, answer) in enumerate(
            zip(self._asked.question, self._asked.answer, strict=True)
        ):
            if self._fits[answer]:
                by_image[images[index].tobytes()] += [index] * times[question]
        groups = []
        for found in by_image.values():
            chance.shuffle(found)
            # The last group is filled up with the image's first questions.
            found += [found[place % len(found)] for place in range(-len(found) % self.together)]
            groups += [found[i : i + self.together] for i in range(0, len(found), self.together)]
        return groups

    @property
    def num_places(self) -> int:
        """How many visual tokens there are: the longest answer that can be spelt."""
        return self.model.bridge.config.num_queries

    @property
    def module(self) -> Bridge:
        """The only part that learns."""
        return self.model.bridge

    def num_samples(self) -> int:
        """Return the number of groups of questions about one image."""
        return len(self._groups)

    def sizes(self) -> None:
        """Rows have one width whatever the answer's length: nothing to bucket."""

    def names(self, indices: Sequence[int]) -> list[str]:
        """Return the ids of the first record of each group."""
        return [self.data.records[self._groups[index][0]].id for index in indices]

    def announce(self, indices: Sequence[int], draws: Sequence[int]) -> None:
        """Have the features of these groups' images read from the disk beside the steps before."""
        self.data.announce([self._groups[index][0] for index in indices], draws)

    def collate(self, indices: Sequence[int]) -> InstructionBatch:
        """Load these groups: features [G, P, E], questions and answers of G * together rows."""
        rows = [row for index in indices for row in self._groups[index]]
        return load_instructions(self.model, self.data, rows, together=self.together)

    def targets(self, answers: Sequence[str]) -> Tensor:
        """Return each place's row in `words` [B, Q]: the answer's tokens, then fillers."""
        return torch.tensor([self._places(answer) for answer in answers], dtype=torch.long)

    def _mean_over_images(self) -> Tensor:
        """Return the mean of each channel [E] over the tokens of some training images."""
        digests = list(dict.fromkeys(self.data.evenly(_MEAN_OF).digests))
        # As they are, not in a drawn view: random numbers belong to the steps.
        return torch.stack([self.data.cache.get([item])[0].mean(dim=0) for item in digests]).mean(0)

    def _seen(self, features: Tensor) -> Tensor:
        """Return a random share of each image's tokens and channels: [G, P, E] to [G, P', E]."""
        images, places, width = features.shape
        kept = max(1, round(self.tokens_seen * places))
        if kept < places:
            chosen = torch.rand(images, places, device=features.device).argsort(dim=1)[:, :kept]
            features = features.gather(1, chosen[..., None].expand(-1, -1, width))
        if self.channels_seen < 1:
            is_seen = torch.rand(images, 1, width, device=features.device) < self.channels_seen
            features = torch.where(is_seen, features, self._channel_means.to(features))
        return features

    def losses(self, batch: InstructionBatch) -> Losses:
        """Return the summed loss of the batch, averaged over places."""
        features = self._seen(batch.features) if self.module.training else batch.features
        visual = self.model.visual_prefix(features, batch.questions)  # [B, Q, H]
        count = torch.tensor(float(len(batch.answers)), device=visual.device)
        return Losses(self.spelling_loss(visual, batch.answers), count)

    def fits(self, answer: str) -> bool:
        """Return whether visual tokens can spell an answer of the data."""
        return answer in self._spelt

    def spelling_loss(self, visual: Tensor, answers: Sequence[str]) -> Tensor:
        """Return the summed loss of visual tokens [B, Q, H] and B answers that fit.

        Cross-entropy, and with `anchor` the squared distance to the word, averaged over places.
        """
        visual = visual.float()
        target = self.targets(answers).to(visual.device)
        loss = F.cross_entropy(
            self.words.scores(visual).flatten(0, 1), target.flatten(), reduction="none"
        )
        if self.anchor:
            distance = (visual - self.words.embeddings[target]).square().sum(dim=-1).flatten()
            loss = loss + self.anchor * distance
        return loss.sum() / self.num_places


@torch.no_grad()
def refit_projection(grounding: GroundingObjective, *, batch_size: int) -> float:
    """Fit the projection to the words' embeddings by ridge regression, in closed form.

    Args:
        grounding: After its cross-entropy steps.
        batch_size: Groups a forward pass.

    Returns:
        Explained variance of the words' embeddings, 0 to 1.
    """
    model = grounding.model
    projection = model.bridge.projection
    assert projection is not None, "this bridge was built without a language model"
    model.bridge.eval()
    rows_wanted = _REFIT_ROWS // (grounding.together * grounding.num_places)
    order = random.Random(grounding.seed).sample(
        range(grounding.num_samples()), min(rows_wanted + 1, grounding.num_samples())
    )
    vocabulary = grounding.words.embeddings.cpu()
    hidden, words = [], []
    for start in range(0, len(order), batch_size):
        batch = grounding.collate(order[start : start + batch_size])
        with model.device.autocast():
            found = model.visual_hidden(batch.features, batch.questions)
        hidden.append(found.flatten(0, 1).double().cpu())
        words.append(vocabulary[grounding.targets(batch.answers)].flatten(0, 1))
    x, y = torch.cat(hidden), torch.cat(words).double()
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    x, y = x - x_mean, y - y_mean
    square = x.t() @ x + _RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(square, x.t() @ y)  # [D, H]
    projection.weight.copy_(weight.t())
    projection.bias.copy_(y_mean - x_mean @ weight)
    return float(1 - (x @ weight - y).square().sum() / y.square().sum().clamp_min(1e-12))
