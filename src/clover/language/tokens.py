"""Text to token ids and back, without the surprises of tokenizers' defaults.

Special tokens are never added silently: the prompt's template spells them out, so that the
sequence the model saw in training is the sequence it sees when serving.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clover.core.errors import CloverError


class Tokens:
    """A tokenizer with the ids that end an answer."""

    def __init__(self, tokenizer: Any, answer_end: str = "") -> None:
        self.tokenizer = tokenizer
        eos = tokenizer.eos_token_id
        if not answer_end:
            if eos is None:
                raise CloverError(
                    "the tokenizer has no end-of-sequence token; name one in prompt.answer_end"
                )
            self.end_id = int(eos)
        else:
            ids = self.encode(answer_end)
            if len(ids) != 1:
                raise CloverError(
                    f"prompt.answer_end {answer_end!r} is {len(ids)} tokens, it must be one; "
                    f"this tokenizer ends a sequence with {tokenizer.eos_token!r}"
                )
            self.end_id = ids[0]
        self.stop_ids = frozenset({self.end_id} | ({int(eos)} if eos is not None else set()))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; special tokens spelled out in it are recognised."""
        if not text:
            return []
        return [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids up to the first end token, without special tokens."""
        kept: list[int] = []
        for token in ids:
            if token in self.stop_ids:
                break
            kept.append(token)
        text: str = self.tokenizer.decode(kept, skip_special_tokens=True)
        return text.strip()

    def spell(self, token: int) -> str:
        """Return one token's own text, special tokens spelt out."""
        text: str = self.tokenizer.decode([token], skip_special_tokens=False)
        return text
