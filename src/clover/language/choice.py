"""Answers out of a short list: which tokens may come next so that one of the texts is written.

In: the token ids of each text that may be said. Out: a `Constraint` a row, read by `generation`.
With greedy writing the row takes, wherever two texts part, the likelier next token: for yes and no,
which part at once, that is a choice by probability.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ChoiceConstraint:
    """Where one row stands among the texts it may write.

    Args:
        texts: Token ids of each text, without end token.
        stop_ids: Tokens that end an answer; they are allowed once a text is whole.
        num_tokens: Scores V that the model gives.
    """

    def __init__(
        self, texts: Sequence[Sequence[int]], *, stop_ids: frozenset[int], num_tokens: int
    ) -> None:
        self._texts = [list(text) for text in texts]
        self._stop_ids = sorted(stop_ids)
        self._num_tokens = num_tokens
        self._place = 0

    def allowed(self) -> Tensor:
        """Return which tokens may come next, `[V]` booleans."""
        allowed = torch.zeros(self._num_tokens, dtype=torch.bool)
        for text in self._texts:
            if len(text) > self._place:
                allowed[text[self._place]] = True
            else:
                allowed[self._stop_ids] = True
        return allowed

    def accept(self, token: int) -> None:
        """Keep the texts that go on with this token."""
        self._texts = [
            text for text in self._texts if len(text) > self._place and text[self._place] == token
        ]
        self._place += 1
