"""Train only the word embeddings that are read, and look those of a step up once.

A vocabulary has 30,523 rows, and the questions of a data set read some hundreds of them. The others
get no gradient, and are not decayed: AdamW leaves them as they are. But their zeros are written,
summed, scaled and stepped over at each step, and saved in each checkpoint, three fifths of all
numbers in a small bridge. With the rows that are read alone, the mathematics is the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clover.qformer.model import QFormer

_TEXTS_AT_ONCE = 4096
"""Texts that are tokenised together to find their words."""


class UsedPieces:
    """Which word pieces stand in any of a million texts, of which few have a new word.

    Args:
        encode: Texts -> the pieces that are read of each; none of a text longer than `limit` are
            left out but beyond it.
        limit: Longest row that `encode` returns.
        is_by_words: Whether a text's pieces are those of its words, split at blanks.
    """

    def __init__(
        self, encode: Callable[[Sequence[str]], list[list[int]]], *, limit: int, is_by_words: bool
    ) -> None:
        self._encode, self._limit, self._is_by_words = encode, limit, is_by_words
        self._found: set[int] = set()
        self._words: set[str] = set()
        """Whose pieces are all found: of texts that were read to their end."""
        self._new: dict[str, None] = {}

    def add(self, text: str) -> None:
        """Look at one more text."""
        if not self._words.issuperset(text.split(" ")):
            self._new[text] = None
            if len(self._new) == _TEXTS_AT_ONCE:
                self._look()

    def found(self) -> set[int]:
        """Return the pieces of all texts so far."""
        self._look()
        return self._found

    def _look(self) -> None:
        texts = list(self._new)
        self._new = {}
        for text, pieces in zip(texts, self._encode(texts) if texts else [], strict=True):
            self._found.update(pieces)
            if self._is_by_words and len(pieces) < self._limit:
                self._words.update(text.split(" "))


class UsedWords(nn.Embedding):
    """Some rows of an embedding, under the ids that they have in it.

    Args:
        whole: The embedding [V, D].
        ids: Which rows [R]. One that comes twice is read from one of its rows.
    """

    places: Tensor
    ids: Tensor

    def __init__(self, whole: nn.Embedding, ids: Tensor) -> None:
        super().__init__(len(ids), whole.embedding_dim, device=whole.weight.device)
        self.weight = nn.Parameter(whole.weight.detach()[ids].clone())
        # An id without a row points before the first one, where a look-up fails.
        places = torch.full((whole.num_embeddings,), -1, device=whole.weight.device)
        places[ids] = torch.arange(len(ids), device=whole.weight.device)
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("ids", ids, persistent=False)
        self._whole = [whole]  # in a list, so that it is no part of the module

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of ids [...] as [..., D].

        Raises:
            IndexError: an id that has no row.
        """
        return F.embedding(self.places[ids], self.weight)

    @torch.no_grad()
    def put_back(self) -> nn.Embedding:
        """Write the rows into the whole embedding; return it, on the rows' device."""
        whole = self._whole[0].to(self.weight.device)
        whole.weight[self.ids.to(self.weight.device)] = self.weight
        return whole


@contextlib.contextmanager
def only_words(qformer: QFormer, ids: Tensor | None) -> Iterator[None]:
    """Let only these rows of the word embedding learn; afterwards they are back in the whole.

    Args:
        qformer: Whose word embedding is read with these ids alone while the context is open.
        ids: Unique [R]; None, or more than half of the vocabulary, leaves all as it is.
    """
    whole = qformer.word_embedding
    if ids is None or not whole.weight.requires_grad or 2 * len(ids) > whole.num_embeddings:
        yield
        return
    used = qformer.word_embedding = UsedWords(whole, ids.to(whole.weight.device))
    try:
        yield
    finally:
        qformer.word_embedding = used.put_back()


@contextlib.contextmanager
def all_words(qformer: QFormer) -> Iterator[None]:
    """Inside `only_words`, let the block read any word, with what is learnt so far."""
    used = qformer.word_embedding
    if not isinstance(used, UsedWords):
        yield
        return
    qformer.word_embedding = used.put_back()
    try:
        yield
    finally:
        qformer.word_embedding = used


@contextlib.contextmanager
def looked_up_once(qformer: QFormer, ids: Tensor) -> Iterator[None]:
    """Let every pass inside the block read the same rows; their gradient is added at its end.

    The backward of a look-up fills a gradient as large as the vocabulary with zeros and adds it to
    the others: five times in a step of stage 1, a fiftieth of it at the published size in bfloat16.

    Args:
        qformer: Whose passes, forward and backward, are inside the block.
        ids: All word ids that they read, any shape.
    """
    whole = qformer.word_embedding
    learns = whole.weight.requires_grad and torch.is_grad_enabled()
    if not learns or isinstance(whole, UsedWords):
        yield
        return
    # To find the different ones is to wait for a GPU; there a word has a row wherever it stands, of
    # which one is read, whichever: all hold the same.
    read = UsedWords(whole, torch.unique(ids) if ids.device.type == "cpu" else ids.flatten())
    qformer.look_up = read.forward  # not the module: it is no part of the Q-Former
    try:
        yield
    finally:
        qformer.look_up = None
    if read.weight.grad is not None:
        if whole.weight.grad is None:
            whole.weight.grad = torch.zeros_like(whole.weight)
        whole.weight.grad.index_add_(0, read.ids, read.weight.grad)
