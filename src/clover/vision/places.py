"""Where in a cache each image's tokens lie: 50 bytes an image and view, looked up by thousands.

A dictionary of a million hashes would be some 300 MB, in every process of a training.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.bytes_]
Integers = npt.NDArray[np.int32]

KEY = "S34"
"""SHA-256 of an image, and the number of the view in two bytes, the image as it is being 0."""
LAST_VIEW = 0xFFFF
_SMALL = 16384
"""Keys that are sorted anew at each addition; more of them go into the large table."""


def make_keys(digests: npt.NDArray[np.uint8], view: int = 0) -> Bytes:
    """Return the keys [N] of one view of images with these SHA-256 [N, 32]."""
    keys = np.empty((len(digests), 34), np.uint8)
    keys[:, :32] = digests
    keys[:, 32:] = divmod(view, 256)
    return keys.view(KEY).ravel()


def digest_array(digests: Iterable[bytes]) -> npt.NDArray[np.uint8]:
    """Return SHA-256 as bytes [N, 32]."""
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)


def first_words(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Return the first eight bytes of each row [N, W] as a number [N].

    Of hashes these differ, but for one pair of a million in 3e7: sorted and searched by numbers,
    a table is some ten times as quick as by its strings.
    """
    return np.ascontiguousarray(rows[:, :8]).view(np.uint64).ravel()


def _bytes_of(keys: Bytes) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(keys).view(np.uint8).reshape(-1, keys.itemsize)


class _Table:
    """Keys, sorted by their first words, and what belongs to them."""

    def __init__(self, keys: Bytes, shards: Integers, rows: Integers) -> None:
        order = np.argsort(first_words(_bytes_of(keys)), kind="stable")
        self.keys, self.shards, self.rows = keys[order], shards[order], rows[order]
        self.words = first_words(_bytes_of(self.keys))

    @classmethod
    def empty(cls) -> _Table:
        return cls(np.empty(0, KEY), np.empty(0, np.int32), np.empty(0, np.int32))

    def joined(self, keys: Bytes, shards: Integers, rows: Integers) -> _Table:
        return _Table(
            np.concatenate([self.keys, keys]),
            np.concatenate([self.shards, shards]),
            np.concatenate([self.rows, rows]),
        )

    def find(self, keys: Bytes) -> tuple[Integers, Integers]:
        shards = np.full(len(keys), -1, np.int32)
        rows = np.zeros(len(keys), np.int32)
        if not len(self.keys) or not len(keys):
            return shards, rows
        words = first_words(_bytes_of(keys))
        order = np.argsort(words)  # neighbours are found in the same cache lines
        places = np.searchsorted(self.words, words[order])
        while len(order):
            is_inside = places < len(self.keys)
            order, places = order[is_inside], places[is_inside]
            is_there = self.keys[places] == keys[order]
            found = order[is_there]
            shards[found], rows[found] = self.shards[places[is_there]], self.rows[places[is_there]]
            # Another view of the image, or a hash that begins alike: the next place is looked at.
            is_alike = ~is_there & (self.words[places] == words[order])
            order, places = order[is_alike], places[is_alike] + 1
        return shards, rows

    def without(self, shard: int) -> _Table:
        kept = self.shards != shard
        return _Table(self.keys[kept], self.shards[kept], self.rows[kept])


class Places:
    """Key -> (shard, row), shards by number."""

    def __init__(self) -> None:
        self._large, self._small = _Table.empty(), _Table.empty()
        self._new: list[tuple[int, Bytes, Integers]] = []

    def count(self, *, view: int) -> int:
        """Return how many images have this view."""
        self._settle()
        keys = np.concatenate([self._large.keys, self._small.keys])
        ends = keys.view(np.uint8).reshape(-1, 34)[:, 32:]
        return len(np.unique(keys[(ends == divmod(view, 256)).all(axis=1)]))

    def add(self, shard: int, keys: Bytes, rows: Integers) -> None:
        """Note that a shard has these keys [N] in these rows [N]."""
        self._new.append((shard, keys, rows))

    def drop(self, shard: int) -> None:
        """Forget a shard."""
        self._settle()
        self._large, self._small = self._large.without(shard), self._small.without(shard)

    def find(self, keys: Bytes) -> tuple[Integers, Integers]:
        """Return the shard and the row of each key [N]; shard -1 where it is nowhere."""
        self._settle()
        shards, rows = self._large.find(keys)
        lost = shards < 0
        if lost.any():
            shards[lost], rows[lost] = self._small.find(keys[lost])
        return shards, rows

    def _settle(self) -> None:
        if not self._new:
            return
        shards = np.concatenate(
            [np.full(len(keys), shard, np.int32) for shard, keys, _ in self._new]
        )
        keys = np.concatenate([keys for _, keys, _ in self._new])
        rows = np.concatenate([rows for _, _, rows in self._new])
        self._new = []
        self._small = self._small.joined(keys, shards, rows)
        if len(self._small.keys) > _SMALL:
            small, self._small = self._small, _Table.empty()
            self._large = self._large.joined(small.keys, small.shards, small.rows)
