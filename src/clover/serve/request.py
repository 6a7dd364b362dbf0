"""What is asked of the engine, and what comes back while it is answered."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from clover.aligned import Aligned
from clover.core.errors import CloverError
from clover.language.constraint import CompiledSchema
from clover.language.frozen import FrozenLanguage
from clover.language.protocol import GenerationSettings
from clover.model import Clover
from clover.serve.writing import Piece


class BusyError(CloverError):
    """The queue is full."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds after which to come again."""


@dataclass(frozen=True)
class Served:
    """A model by the name that clients call it; without `clover` it reads text alone."""

    name: str
    language: FrozenLanguage
    clover: Clover | None = None
    alignment: Aligned | None = None
    """Stage 1's abilities, for embeddings."""

    def encoder_key(self, sha256: str) -> tuple[str, str, str]:
        """Return what image features are kept under."""
        assert self.clover is not None, "a language model has no image encoder"
        return (self.clover.encoder.id, self.clover.encoder.revision, sha256)


@dataclass(frozen=True)
class Picture:
    """An image: its hash, and its pixels for the encoder or what the encoder made of them."""

    sha256: str
    """Of the image's bytes, or of whatever else tells it from all others."""
    pixels: Tensor | None = None
    """`[3, S, S]`."""
    features: Tensor | None = None
    """`[1, P, E]`."""


@dataclass(frozen=True)
class Question:
    """One request for one or several answers."""

    model: str
    settings: GenerationSettings
    question: str = ""
    """About the picture, without template."""
    picture: Picture | None = None
    turns: tuple[tuple[str, str], ...] = ()
    """Earlier (question, answer) pairs about the picture, oldest first."""
    system: str = ""
    """Read by the language model before the first question; the Q-Former reads questions alone."""
    messages: tuple[Mapping[str, str], ...] = ()
    """A conversation without a picture, for the language model's own chat template."""
    seeds: tuple[int, ...] = (0,)
    """One an answer."""
    stops: tuple[str, ...] = ()
    num_top: int | None = None
    """Token scores are returned, with so many of the likeliest; none when absent."""
    schema: CompiledSchema | None = None


@dataclass(frozen=True)
class Begun:
    """The prompt was read."""

    prompt_tokens: int
    reused_tokens: int
    """Of these, so many had been read before."""
    note: str | None = None
    """On an image that is unlike those the model learnt from."""


Event = Begun | Piece | Exception
"""What a request's `emit` is called with; an exception is the last."""


@dataclass(eq=False)
class Ticket:
    """A request in the engine."""

    question: Question
    emit: Callable[[Event], None]
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Stop working on it; from any thread, also when it has ended."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._cancelled.is_set()
