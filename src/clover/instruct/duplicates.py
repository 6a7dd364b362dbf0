"""Near-duplicates by MinHash: pairs that ask and say the same in other words.

A text becomes a set of shingles, the set 64 minima of a hash family, the minima 16 bands of 4; two
texts that share a band are compared exactly. Memory grows with the texts kept, not with pairs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from clover.core.files import fingerprint

_PERMUTATIONS = 64
_BANDS = 16
# Products of two numbers below it fit into 64 bits, and wrap around it often enough to mix.
_PRIME = (1 << 31) - 1


class NearDuplicates:
    """Finds, for each text in turn, an earlier one that is nearly the same.

    Args:
        threshold: Jaccard similarity from which two sets count as the same.
    """

    def __init__(self, threshold: float = 0.8) -> None:
        self.threshold = threshold
        generator = np.random.default_rng(0)
        self._multiply = generator.integers(1, _PRIME, _PERMUTATIONS, dtype=np.uint64)
        self._add = generator.integers(0, _PRIME, _PERMUTATIONS, dtype=np.uint64)
        self._bands: dict[tuple[str, int, bytes], list[int]] = defaultdict(list)
        self._sets: list[frozenset[str]] = []

    def signature(self, shingles: Iterable[str]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """Return the minima of the hash family, [64]."""
        values = np.array([int(fingerprint(s)[:7], 16) for s in shingles], dtype=np.uint64)
        hashed = (values[:, None] * self._multiply + self._add) % np.uint64(_PRIME)
        minima: np.ndarray[tuple[int], np.dtype[np.uint64]] = hashed.min(axis=0)
        return minima

    def find_or_add(self, shingles: frozenset[str], *, scope: str = "") -> bool:
        """Say whether a near-duplicate came before within the scope; remember the set if not."""
        if not shingles:
            return False
        rows = _PERMUTATIONS // _BANDS
        signature = self.signature(shingles)
        keys = [
            (scope, band, signature[band * rows : (band + 1) * rows].tobytes())
            for band in range(_BANDS)
        ]
        candidates = {index for key in keys for index in self._bands.get(key, ())}
        if any(_jaccard(shingles, self._sets[index]) >= self.threshold for index in candidates):
            return True
        self._sets.append(shingles)
        for key in keys:
            self._bands[key].append(len(self._sets) - 1)
        return False


def _jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    return len(first & second) / len(first | second)
