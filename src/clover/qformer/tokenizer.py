"""The Q-Former's WordPiece tokenizer: BERT's, with `[DEC]` added as the last id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import Tensor

from clover.core.errors import CloverError

WIDTHS = 8
"""Texts are padded to a multiple of so many tokens while a Q-Former learns on a GPU: each width is
recorded for itself (`training.replay`)."""


@dataclass(frozen=True)
class Tokens:
    """Word pieces: `ids` [B, T] and `mask` [B, T] (1 = a token, 0 = padding)."""

    ids: Tensor
    mask: Tensor


class TextTokenizer:
    """Turns text into ids as the published system does.

    Args:
        path: A `tokenizer.json`; `[CLS]`, `[SEP]` and `[PAD]` must be known to it.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            raise CloverError(f"{path} is not a tokenizer.json: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # Checkpoints bring their own padding and truncation; ours are explicit in `__call__`.
        self.pad = self._id("[PAD]")
        self.start = self._id("[CLS]")
        self.end = self._id("[SEP]")
        if self._tokenizer.token_to_id("[DEC]") is None:
            self._tokenizer.add_special_tokens(["[DEC]"])
        self.decode_start = self._id("[DEC]")

    def _id(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise CloverError(f"the tokenizer has no {token} token; a BERT tokenizer is needed")
        return int(found)

    @property
    def vocab_size(self) -> int:
        """Number of ids, `[DEC]` included."""
        return int(self._tokenizer.get_vocab_size())

    @property
    def is_by_words(self) -> bool:
        """Whether the pieces of a text are those of its words, split at blanks, and no others.

        So it is with BERT's: blanks part words before anything else is looked at.
        """
        added = self._tokenizer.get_added_tokens_decoder().values()
        return (
            isinstance(self._tokenizer.pre_tokenizer, BertPreTokenizer)
            and isinstance(self._tokenizer.model, WordPiece)
            and isinstance(self._tokenizer.normalizer, BertNormalizer)
            and not any(" " in token.content for token in added)
        )

    def __call__(
        self,
        texts: Sequence[str],
        *,
        limit: int,
        side: Literal["left", "right"] = "right",
        multiple: int = 1,
    ) -> Tokens:
        """Encode texts as ``[CLS] … [SEP]``, padded to the longest of them.

        Args:
            texts: B texts.
            limit: Longest row, the two special tokens included.
            side: Where a longer text loses words: its end (stage 1) or its beginning (stage 2).
            multiple: Of which the width is one, unless it is the limit; for few widths.
        """
        rows = []
        for text in texts:
            pieces = self._tokenizer.encode(text, add_special_tokens=False).ids
            keep = limit - 2
            pieces = pieces[:keep] if side == "right" else pieces[max(0, len(pieces) - keep) :]
            rows.append([self.start, *pieces, self.end])
        longest = max(map(len, rows))
        width = max(longest, min(-(-longest // multiple) * multiple, limit))
        ids = torch.full((len(rows), width), self.pad, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
        return Tokens(ids, mask)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of word pieces, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
