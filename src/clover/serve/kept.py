"""What is kept because it may be asked for again: image features, and prompts already read.

Both are bounded in bytes and forget what was not used for longest.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor

from clover.language.rows import KeyValues

Symbol = Hashable
"""What stands at a place of a prompt: a token id, or (image, question, n) for a visual token."""


class FeatureStore:
    """Image tokens by (encoder, SHA-256 of the image's bytes); used from any thread."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._kept: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Tensor | None:
        """Return the tokens `[1, P, E]`, or none."""
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
            return found

    def put(self, key: Hashable, features: Tensor) -> None:
        """Keep tokens; older ones go when the bytes do not suffice."""
        with self._lock:
            if key in self._kept:
                return
            self._kept[key] = features
            self.num_bytes += _size(features)
            while self.num_bytes > self.max_bytes and self._kept:
                _, gone = self._kept.popitem(last=False)
                self.num_bytes -= _size(gone)

    def __len__(self) -> int:
        """Return how many images are kept."""
        return len(self._kept)


@dataclass(frozen=True)
class KeptPrompt:
    """A prompt's symbols with the keys and values of all of them.

    The constant text before the image is the same for all of a model's prompts: it is held once
    (`base`), and each prompt adds its own part.
    """

    symbols: tuple[Symbol, ...]
    base: KeyValues | None
    own: KeyValues
    is_constant: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of the own part."""
        return sum(_size(keys) + _size(values) for keys, values in self.own)

    def constant(self, length: int) -> tuple[Symbol, ...]:
        """Return the constant text that the first `length` places begin with, whole, or nothing."""
        size = (self.own if self.base is None else self.base)[0][0].shape[1]
        has_all = length >= size and (self.is_constant or self.base is not None)
        return self.symbols[:size] if has_all else ()

    def beginning(self, length: int) -> list[KeyValues]:
        """Return stretches that together are the first `length` places."""
        parts = []
        if self.base is not None:
            shared = self.base[0][0].shape[1]
            parts.append(_cut(self.base, min(length, shared)))
            length -= min(length, shared)
        if length:
            parts.append(_cut(self.own, length))
        return parts


class PromptStore:
    """Prompts already read, found by how long a beginning they share with a new one.

    Sound by construction: keys and values at a place depend on the symbols up to that place and
    on nothing else, and a visual token's symbol names everything that it was computed from.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._constant: dict[tuple[Symbol, ...], KeptPrompt] = {}
        self._kept: OrderedDict[tuple[Symbol, ...], KeptPrompt] = OrderedDict()

    def pin(self, symbols: Sequence[Symbol], read: KeyValues) -> None:
        """Keep a constant beginning for good."""
        key = tuple(symbols)
        self._constant[key] = KeptPrompt(key, None, read, is_constant=True)

    def constant(self, symbols: Sequence[Symbol]) -> KeyValues:
        """Return the keys and values of a constant beginning."""
        return self._constant[tuple(symbols)].own

    def base(self, symbols: Sequence[Symbol]) -> KeptPrompt | None:
        """Return the longest constant beginning of a prompt."""
        found = [kept for key, kept in self._constant.items() if tuple(symbols[: len(key)]) == key]
        return max(found, key=lambda kept: len(kept.symbols), default=None)

    def find(self, symbols: Sequence[Symbol]) -> tuple[KeptPrompt | None, int]:
        """Return the prompt that shares the longest beginning, and how long that is."""
        best, longest = None, 0
        for kept in (*self._constant.values(), *self._kept.values()):
            shared = shared_length(kept.symbols, symbols)
            if shared > longest:
                best, longest = kept, shared
        if best is not None and best.symbols in self._kept:
            self._kept.move_to_end(best.symbols)
        return best, longest

    def put(self, symbols: Sequence[Symbol], base: KeptPrompt | None, own: KeyValues) -> None:
        """Keep a prompt; those that are its beginning, and the oldest ones, go."""
        key = tuple(symbols)
        if key in self._kept:
            return
        for other in [item for item in self._kept if key[: len(item)] == item]:
            self._drop(other)
        self._kept[key] = KeptPrompt(key, None if base is None else base.own, own)
        self.num_bytes += self._kept[key].num_bytes
        while self.num_bytes > self.max_bytes and self._kept:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: tuple[Symbol, ...]) -> None:
        self.num_bytes -= self._kept.pop(key).num_bytes

    def __len__(self) -> int:
        """Return how many prompts are kept, constant beginnings apart."""
        return len(self._kept)


def shared_length(first: Sequence[Symbol], second: Sequence[Symbol]) -> int:
    """Return how many places two prompts share from the beginning."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count


def _cut(read: KeyValues, length: int) -> KeyValues:
    return tuple((keys[:, :length], values[:, :length]) for keys, values in read)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
