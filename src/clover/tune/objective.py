"""Stage 2 as an objective for the loop: image and question in, loss of the answer's words out."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from clover.core.number_format import without_autocast
from clover.core.record_file import columns
from clover.language.decoder_only import AnswerBatch, DecoderOnly
from clover.model import Clover
from clover.qformer.bridge import Bridge
from clover.qformer.used_words import UsedPieces
from clover.training.objective import Losses
from clover.training.replay import Replay, is_on_one_gpu
from clover.vision.dataset import FeatureSet


def _size(question: str | None, answer: str | None, answer_type: str | None) -> int:
    return len(answer or "") + len(question or "") // 2


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


@dataclass(frozen=True)
class KeptSpelling:
    """A loss of visual tokens that stands beside the language model's.

    Attributes:
        fits: Whether an answer has such a loss.
        loss: Its sum over visual tokens [B, Q, H] and B answers that fit.
        weight: Beside the loss of each of an answer's tokens.
    """

    fits: Callable[[str], bool]
    loss: Callable[[Tensor, Sequence[str]], Tensor]
    weight: float

    def of(self, visual: Tensor, answers: Sequence[str]) -> Tensor:
        """Return the weighted loss of visual tokens [B, Q, H] and B answers, 0 of none that fits.

        A sum over rows beside one over tokens: however a batch is split, it adds up to the same.
        """
        rows = [row for row, answer in enumerate(answers) if self.fits(answer)]
        if not rows:
            return visual.new_zeros(())
        return self.weight * self.loss(visual[rows], [answers[row] for row in rows])


@dataclass
class TuneObjective:
    """Cross-entropy of the answer's tokens under the frozen language model."""

    model: Clover
    data: FeatureSet
    kept: KeptSpelling | None = None
    """What was learnt before the language model was asked, and is still held to."""
    _sizes: Sequence[int] | None = field(default=None, init=False, repr=False)
    _replay: Replay | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.data.send_to(self.model.device.device)
        if self.model.recipe.tune.compile:
            self.model.bridge.qformer.compile_layers()
        if self._can_be_replayed:
            self._replay = Replay(self._backward)

    @property
    def _can_be_replayed(self) -> bool:
        """Whether steps are recorded and replayed: on one GPU, if nothing waits for it."""
        model = self.model
        return (
            model.recipe.tune.cuda_graphs
            and is_on_one_gpu(model.device)
            and getattr(model.language, "can_be_replayed", False)
            and not model.bridge.config.checkpoint_activations
        )

    @property
    def module(self) -> Bridge:
        """The only part that learns."""
        return self.model.bridge

    def num_samples(self) -> int:
        """Return the number of instructions."""
        return len(self.data.records)

    def sizes(self) -> Sequence[int]:
        """Return the answers' lengths: one long answer would pad a whole batch of short ones."""
        if self._sizes is None:
            self._sizes = array("i", (_size(*row) for row in self._texts()))
        return self._sizes

    def words(self) -> Tensor | None:
        """Return the ids that the Q-Former reads of any question, unique [R]; None when of none.

        One pass over the records, which measures their `sizes` too.
        """
        if not self.model.recipe.tune.instruction_aware:
            return None
        used = UsedPieces(
            self._ids,
            limit=self.model.recipe.tune.max_question_tokens,
            is_by_words=self.model.tokenizer.is_by_words,
        )
        sizes = array("i")
        put = self.model.prompt.question
        for question, answer, answer_type in self._texts():
            used.add(put(question or "", is_closed=answer_type == "closed"))
            sizes.append(_size(question, answer, answer_type))
        self._sizes = sizes
        return torch.tensor(sorted(used.found() | {self.model.tokenizer.pad}))

    def _texts(self) -> Iterator[tuple[Any, ...]]:
        return columns(self.data.records, "question", "answer", "answer_type")

    def _ids(self, questions: Sequence[str]) -> list[list[int]]:
        tokens = self.model.question_tokens(questions)
        assert tokens is not None, "asked of a Q-Former that reads no questions"
        rows = zip(tokens.ids.tolist(), tokens.mask.sum(dim=1).tolist(), strict=True)
        return [ids[:length] for ids, length in rows]

    def names(self, indices: Sequence[int]) -> list[str]:
        """Return the records' ids."""
        return [self.data.records[index].id for index in indices]

    def announce(self, indices: Sequence[int], draws: Sequence[int]) -> None:
        """Have these images' features read from the disk beside the steps before."""
        self.data.announce(indices, draws)

    def collate(self, indices: Sequence[int]) -> InstructionBatch:
        """Load the instructions with these indices."""
        return load_instructions(self.model, self.data, indices)

    def losses(self, batch: InstructionBatch) -> Losses:
        """Return summed loss and number of answer tokens."""
        if self._replay is not None and self.kept is None:  # which `ground` sets afterwards
            return self._replayed(batch, self._replay)
        visual = self.model.visual_prefix(batch.features, batch.questions)
        total, count = self.model.language.loss(visual, batch.questions, batch.answers)
        if self.kept is not None:
            total = total + self.kept.of(visual, batch.answers)
        return Losses(total, count)

    def _replayed(self, batch: InstructionBatch, replay: Replay) -> Losses:
        """Return the same, gone backward, of a batch in one of few shapes."""
        model = self.model
        put = model.device.put
        said = cast(DecoderOnly, model.language).answer_batch(
            batch.questions, batch.answers, num_queries=model.bridge.config.num_queries
        )
        inputs = [put(batch.features), *map(put, (said.ids, said.places, said.labels))]
        asked = model.question_tokens(batch.questions)
        if asked is not None:
            inputs += [asked.ids, asked.mask]
        total = replay(*inputs)["total"]
        count = torch.full((), float(said.count), device=total.device)
        return Losses(total, count, is_backward_done=True)

    def _backward(
        self, features: Tensor, ids: Tensor, places: Tensor, labels: Tensor, *asked: Tensor
    ) -> dict[str, Tensor]:
        """Go forward and backward; return the summed loss."""
        model = self.model
        image = model.bridge.read_image(features)
        visual = model.bridge.visual_prefix(image, *asked)
        if len(visual) < len(ids):  # a Q-Former that reads no question has one prefix an image
            visual = visual.repeat_interleave(len(ids) // len(visual), dim=0)
        said = AnswerBatch(ids, places, labels, len(labels))
        total = cast(DecoderOnly, model.language).loss_of_batch(visual, said)
        with without_autocast(total.device):
            total.backward()  # type: ignore[no-untyped-call]
        return {"total": total.detach()}
