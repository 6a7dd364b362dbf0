"""The seam every language model is driven through, and the settings of generation.

In: visual tokens `[B, Q, H]` (or none) and instructions. Out: a loss to learn from, or text.
Decoder-only and encoder-decoder models are two classes behind `LanguageModel`; training,
evaluation and serving know only this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:  # `clover doctor` comes here where torch may be absent
    from torch import Tensor

from clover.core.errors import CloverError


@dataclass(frozen=True)
class GenerationSettings:
    """How an answer is written. The defaults are greedy."""

    num_beams: int = 1
    """1 is greedy or sampling; more is beam search."""
    min_tokens: int = 1
    """The answer cannot end before so many tokens; 1 forbids the empty answer."""
    max_tokens: int = 64
    """The answer is cut after so many tokens."""
    temperature: float = 0.0
    """0 is greedy; above 0 samples."""
    top_p: float = 1.0
    """Sampling keeps the likeliest tokens that together reach this probability."""
    repetition_penalty: float = 1.0
    """Divides the score of tokens the answer already holds; the published system uses 1.5."""
    length_penalty: float = 1.0
    """Exponent on the length in beam search."""
    seed: int = 0
    """Of sampling; every row of a batch draws from its own generator with this seed."""

    def __post_init__(self) -> None:
        limits = (
            ("num_beams", self.num_beams >= 1, "at least 1"),
            ("min_tokens", self.min_tokens >= 0, "at least 0"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("min_tokens", self.min_tokens <= self.max_tokens, f"at most {self.max_tokens}"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        )
        for name, is_allowed, limit in limits:
            if not is_allowed:
                raise CloverError(f"{name} is {getattr(self, name)}, it must be {limit}")
        if self.num_beams > 1 and self.temperature > 0:
            raise CloverError(
                f"num_beams is {self.num_beams} and temperature {self.temperature}: "
                "beam search does not sample; set one of them to its default (1, 0)"
            )


@runtime_checkable
class LanguageModel(Protocol):
    """A frozen language model that reads visual tokens as if they were words."""

    @property
    def id(self) -> str:
        """The asset reference or name the weights came from."""
        ...

    @property
    def hidden_size(self) -> int:
        """Width H of its embeddings: the width a visual token must have."""
        ...

    @property
    def licence(self) -> str:
        """Licence of the weights."""
        ...

    def answer_ids(self, answer: str) -> list[int]:
        """Return the ids of an answer, its end token last."""
        ...

    def text_tokens(self, text: str) -> list[int]:
        """Return the ids of a piece of text, with nothing added."""
        ...

    def word_embeddings(self, ids: Tensor) -> Tensor:
        """Return the input embeddings `[N, H]` of token ids `[N]`."""
        ...

    def embedding_statistics(self) -> tuple[Tensor, float]:
        """Return mean `[H]` and overall standard deviation of the word embeddings, float32."""
        ...

    def loss(
        self, visual: Tensor | None, instructions: Sequence[str], answers: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Return the summed token cross-entropy (float32, scalar) and the answer token count.

        Args:
            visual: `[B, Q, H]`; gradients flow into it and nowhere else.
            instructions: B questions, without template.
            answers: B answers, without end token.
        """
        ...

    def generate(
        self,
        visual: Tensor | None,
        instructions: Sequence[str],
        settings: GenerationSettings,
        *,
        choices: Sequence[Sequence[str] | None] | None = None,
    ) -> list[str]:
        """Return B answers. `visual` is `[B, Q, H]` or none.

        A row with `choices` gives one of these, by probability, token by token.
        """
        ...

    def generate_text(
        self, visual: Tensor | None, after_image: Sequence[str], settings: GenerationSettings
    ) -> list[str]:
        """Return B answers to texts that already carry the template, as from `conversation`."""
        ...

    def stream(
        self, visual: Tensor | None, instruction: str, settings: GenerationSettings
    ) -> Iterator[str]:
        """Yield one answer in pieces whose concatenation equals `generate`'s.

        `visual` is `[1, Q, H]` or none.
        """
        ...

    def stream_text(
        self, visual: Tensor | None, after_image: str, settings: GenerationSettings
    ) -> Iterator[str]:
        """Yield one answer to a text that already carries the template."""
        ...

    def rank(
        self, visual: Tensor | None, instruction: str, candidates: Sequence[str]
    ) -> list[float]:
        """Return the summed log-likelihood of each candidate answer, end token included.

        `visual` is `[1, Q, H]` or none.
        """
        ...
