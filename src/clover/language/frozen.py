"""What both kinds of frozen language model share: from text to ids, and from ids to text.

In: a model, its tokenizer, the prompt. Out: the text half of the `LanguageModel` seam; the id
half is each kind's own.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from clover.core.config import LanguageConfig
from clover.core.errors import CloverError
from clover.language.choice import ChoiceConstraint
from clover.language.generation import Constraint, collect_tokens, iterate_tokens, stream_text
from clover.language.prompt import Prompt
from clover.language.protocol import GenerationSettings
from clover.language.tokens import Tokens

Ids = Sequence[Sequence[int]]
"""Token ids of B rows of different lengths."""


class FrozenLanguage(ABC):
    """A language model that is read and never trained.

    Args:
        model: a transformers model; it is put into eval mode and frozen.
        tokenizer: its tokenizer.
        prompt: how image and question are put.
        config: name, licence and token limits.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, prompt: Prompt, config: LanguageConfig
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config = config
        self.id = config.weights
        self.licence = config.licence
        self.hidden_size = int(model.config.hidden_size)
        self._embed = model.get_input_embeddings()
        self.prompt = prompt
        self.tokens = Tokens(tokenizer, prompt.answer_end)
        self.prefix_ids = tuple(self.tokens.encode(prompt.before_image))
        """Ids of the constant text before the image."""
        self._start_text = self._start_ids(config.text_start)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        device: torch.device = self._embed.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        dtype: torch.dtype = self._embed.weight.dtype
        return dtype

    @property
    def vocabulary_size(self) -> int:
        """Scores V that the model gives a token; may be more than its tokenizer has tokens."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    def _start_ids(self, text: str) -> list[int]:
        """Return the ids of `language.text_start`, which must be one token or none.

        Raises:
            CloverError: it is several tokens.
        """
        ids = self.tokens.encode(text)
        if len(ids) > 1:
            raise CloverError(
                f"language.text_start {text!r} is {len(ids)} tokens, it must be one; "
                "Vicuna's is '</s>'"
            )
        return ids

    @contextlib.contextmanager
    def _as_published(self) -> Iterator[None]:
        """Within the block, let the model drop units as the published training does.

        # Paper: the frozen model stays in training mode; here only with `paper_dropout`
        # (docs/decisions/0002).
        """
        if not self.config.paper_dropout or not torch.is_grad_enabled():
            yield
            return
        self.model.train()
        try:
            yield
        finally:
            self.model.eval()

    def text_tokens(self, text: str) -> list[int]:
        """Return the ids of a piece of text, with nothing added."""
        return self.tokens.encode(text)

    def word_embeddings(self, ids: Tensor) -> Tensor:
        """Return the input embeddings `[N, H]` of token ids `[N]`."""
        words: Tensor = self._embed(ids).detach()
        return words

    def embedding_statistics(self) -> tuple[Tensor, float]:
        """Return mean `[H]` and overall standard deviation of the word embeddings, float32."""
        words = self._embed.weight.detach().float()
        return words.mean(dim=0), float(words.std())

    def loss(
        self, visual: Tensor | None, instructions: Sequence[str], answers: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Return summed token cross-entropy (float32) and answer token count.

        Args:
            visual: `[B, Q, H]` or none; gradients flow into it and nowhere else.
            instructions: B questions, without template.
            answers: B answers, without end token.
        """
        with self._as_published():
            return self.loss_from_ids(
                visual,
                [self.instruction_ids(text) for text in instructions],
                [self.answer_ids(text) for text in answers],
                prefix=self.prefix_ids,
            )

    def generate(
        self,
        visual: Tensor | None,
        instructions: Sequence[str],
        settings: GenerationSettings,
        *,
        choices: Sequence[Sequence[str] | None] | None = None,
    ) -> list[str]:
        """Return one answer an instruction. `visual` is `[B, Q, H]` or none.

        Args:
            visual: `[B, Q, H]` or none.
            instructions: B questions, without template.
            settings: how to write.
            choices: one a row: the answers it may give, or none for any; not for beam search.
        """
        texts = [self.prompt.split(instruction)[1] for instruction in instructions]
        return self.generate_text(visual, texts, settings, choices=choices)

    def generate_text(
        self,
        visual: Tensor | None,
        after_image: Sequence[str],
        settings: GenerationSettings,
        *,
        choices: Sequence[Sequence[str] | None] | None = None,
    ) -> list[str]:
        """Return one answer to each text that already carries the template (`Prompt`)."""
        prompts = [self.text_ids(text) for text in after_image]
        rows = self.generate_from_ids(
            visual, prompts, settings, prefix=self.prefix_ids, constraints=self._confined(choices)
        )
        return [self.tokens.decode(row) for row in rows]

    def _confined(
        self, choices: Sequence[Sequence[str] | None] | None
    ) -> list[Constraint | None] | None:
        """Return a constraint for each row that has choices; none where no row has any."""
        if choices is None or not any(choices):
            return None
        return [
            None
            if not texts
            else ChoiceConstraint(
                [self.tokens.encode(text) for text in texts],
                stop_ids=self.tokens.stop_ids,
                num_tokens=self.vocabulary_size,
            )
            for texts in choices
        ]

    def stream(
        self, visual: Tensor | None, instruction: str, settings: GenerationSettings
    ) -> Iterator[str]:
        """Yield one answer in pieces. `visual` is `[1, Q, H]` or none."""
        yield from self.stream_text(visual, self.prompt.split(instruction)[1], settings)

    def stream_text(
        self, visual: Tensor | None, after_image: str, settings: GenerationSettings
    ) -> Iterator[str]:
        """Yield one answer to a text that already carries the template (`Prompt`)."""
        if settings.num_beams > 1:
            # The best beam is known only at the end: there is nothing to show before.
            yield self.generate_text(visual, [after_image], settings)[0]
            return
        steps = self.steps(visual, [self.text_ids(after_image)], settings, prefix=self.prefix_ids)
        yield from stream_text(steps, self.tokens)

    @abstractmethod
    def rank(
        self, visual: Tensor | None, instruction: str, candidates: Sequence[str]
    ) -> list[float]:
        """Return the summed log-likelihood of each candidate, end token included."""

    def choose(
        self, visual: Tensor | None, instructions: Sequence[str], candidates: Sequence[str]
    ) -> list[int]:
        """Return the index of the likeliest candidate for each instruction."""
        chosen = []
        for row, instruction in enumerate(instructions):
            image = None if visual is None else visual[row : row + 1]
            scores = self.rank(image, instruction, candidates)
            chosen.append(max(range(len(scores)), key=scores.__getitem__))
        return chosen

    def instruction_ids(self, instruction: str) -> list[int]:
        """Return the ids after the image; a long instruction loses its beginning."""
        return self.text_ids(self.prompt.split(instruction)[1])

    @abstractmethod
    def text_ids(self, after_image: str) -> list[int]:
        """Return the ids of a text after the image, cut to `max_instruction_tokens`."""

    @abstractmethod
    def answer_ids(self, answer: str) -> list[int]:
        """Return the ids of an answer and its end, cut to `max_answer_tokens`."""

    @abstractmethod
    def loss_from_ids(
        self, visual: Tensor | None, instruction_ids: Ids, answer_ids: Ids, *, prefix: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return summed cross-entropy and token count, for callers with their own ids."""

    def generate_from_ids(
        self,
        visual: Tensor | None,
        prompt_ids: Ids,
        settings: GenerationSettings,
        *,
        prefix: Sequence[int] = (),
        seeds: Sequence[int] | None = None,
        constraints: Sequence[Constraint | None] | None = None,
    ) -> list[list[int]]:
        """Return the ids written after ``[prefix][visual][prompt]``, end token included.

        Args:
            visual: `[B, Q, H]` or none.
            prompt_ids: B id lists.
            settings: how to write.
            prefix: ids before the visual tokens of every row.
            seeds: one a row; `settings.seed` for every row when absent.
            constraints: one a row, or none, of what it may write; not for beam search.
        """
        if not prompt_ids:
            return []
        if settings.num_beams > 1:
            assert constraints is None, "beam search knows no constraints"
            return self._beam_search(visual, prompt_ids, settings, prefix=prefix)
        steps = self.steps(
            visual, prompt_ids, settings, prefix=prefix, seeds=seeds, constraints=constraints
        )
        return collect_tokens(steps, len(prompt_ids))

    @torch.no_grad()
    def steps(
        self,
        visual: Tensor | None,
        prompt_ids: Ids,
        settings: GenerationSettings,
        *,
        prefix: Sequence[int],
        seeds: Sequence[int] | None = None,
        constraints: Sequence[Constraint | None] | None = None,
    ) -> Iterator[list[tuple[int, int]]]:
        """Yield, step by step, the (row, token id) pairs that `generate_from_ids` collects."""
        logits, stepper = self._begin(visual, prompt_ids, prefix, settings.max_tokens)
        yield from iterate_tokens(
            logits,
            stepper,
            settings,
            stop_ids=self.tokens.stop_ids,
            seeds=seeds,
            constraints=constraints,
        )

    @abstractmethod
    def _begin(
        self, visual: Tensor | None, prompt_ids: Ids, prefix: Sequence[int], max_tokens: int
    ) -> tuple[Tensor, Any]:
        """Read the prompts; return the first logits `[B, V]` and the stepper that goes on."""

    @torch.no_grad()
    def _beam_search(
        self,
        visual: Tensor | None,
        prompt_ids: Ids,
        settings: GenerationSettings,
        *,
        prefix: Sequence[int],
    ) -> list[list[int]]:
        """Search by transformers, which reads the prefix again rather than from the cache."""
        embeds, mask = self._embedded(visual, prompt_ids, prefix)
        out = self.model.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            num_beams=settings.num_beams,
            do_sample=False,
            max_new_tokens=settings.max_tokens,
            min_new_tokens=settings.min_tokens,
            repetition_penalty=settings.repetition_penalty,
            length_penalty=settings.length_penalty,
            eos_token_id=sorted(self.tokens.stop_ids),
            pad_token_id=self.tokens.end_id,
        )
        rows: list[list[int]] = out.tolist()
        return rows

    @abstractmethod
    def _embedded(
        self, visual: Tensor | None, prompt_ids: Ids, prefix: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return embeddings `[B, P+Q+T, H]` of ``[prefix][visual][prompt]`` and their mask."""

    def _joined(self, prefix: Sequence[int], visual: Tensor | None, ids: Tensor) -> Tensor:
        """Return `[B, P+Q+T, H]` embeddings of ``[prefix][visual][ids]``."""
        words: Tensor = self._embed(ids)
        before = []
        if prefix:
            start = self._embed(torch.tensor([list(prefix)], device=ids.device))
            before.append(start.expand(len(ids), -1, -1))
        if visual is not None:
            before.append(self._as_words(visual))
        return torch.cat([*before, words], dim=1) if before else words

    def _as_words(self, visual: Tensor) -> Tensor:
        """Return visual tokens `[B, Q, H]` where and as the words' embeddings are."""
        if visual.shape[-1] != self.hidden_size:
            raise CloverError(
                f"visual tokens are {visual.shape[-1]} wide, {self.id} reads "
                f"{self.hidden_size}; the bridge was trained for another language model"
            )
        words = self._embed.weight
        return visual.to(words.device, words.dtype)

    def _padded(self, rows: Ids, *, is_left: bool = False) -> tuple[Tensor, Tensor]:
        """Return ids `[B, T]` and mask `[B, T]`, as wide as the longest row."""
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, values in enumerate(rows):
            place = slice(width - len(values), None) if is_left else slice(0, len(values))
            ids[row, place] = torch.tensor(values, dtype=torch.long)
            mask[row, place] = 1
        return ids.to(self.device), mask.to(self.device)


def with_ones_before(mask: Tensor, width: int) -> Tensor:
    """Return a `[B, width]` mask that ends in `mask` and is 1 before it."""
    return torch.cat([mask.new_ones(len(mask), width - mask.shape[1]), mask], dim=1)
