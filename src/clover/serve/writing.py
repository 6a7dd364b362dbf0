"""One answer while it is written: from tokens to text, whole characters and stop strings.

In: token ids, one at a time. Out: pieces of text that will not be taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from clover.language.tokens import Tokens

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenScore:
    """A written token, its log-probability, and the likeliest tokens in its place."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one step adds to one answer."""

    answer: int
    """Which of a request's answers."""
    text: str
    finish_reason: FinishReason | None = None
    scores: tuple[TokenScore, ...] = ()
    num_tokens: int = 1


class Writing:
    """The text of one answer so far.

    Args:
        tokens: The tokenizer.
        max_tokens: The answer is cut after so many.
        stops: Strings that end the answer; they are not part of it.
    """

    def __init__(self, tokens: Tokens, *, max_tokens: int, stops: Sequence[str] = ()) -> None:
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._tokens = tokens
        self._max_tokens = max_tokens
        self._stops = tuple(stops)
        self._shown = ""

    def take(self, token: int) -> str:
        """Append a token; return the text that is certain now."""
        self.ids.append(token)
        if token in self._tokens.stop_ids:
            self.finish_reason = "stop"
        elif len(self.ids) == self._max_tokens:
            self.finish_reason = "length"
        text = self._tokens.decode(self.ids)
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.finish_reason = "stop"
            text = text[: min(places)]
        elif self.finish_reason is None:
            text = text[: len(text) - self._held_back(text)]
            # A character may need several tokens; half of one decodes to the replacement sign.
            if text.endswith("\ufffd"):
                return ""
        if not text.startswith(self._shown):
            return ""
        new, self._shown = text[len(self._shown) :], text
        return new

    def _held_back(self, text: str) -> int:
        """Return the length of the end that may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


def score(logits: Tensor, token: int, num_top: int, tokens: Tokens) -> TokenScore:
    """Return a token's log-probability under the model's own distribution.

    Args:
        logits: `[V]`, before temperature and penalties.
        token: The written one.
        num_top: How many of the likeliest are named.
        tokens: The tokenizer.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    best = logprobs.topk(num_top)
    top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return TokenScore(
        tokens.spell(token),
        float(logprobs[token]),
        tuple((tokens.spell(index), value) for index, value in top),
    )
