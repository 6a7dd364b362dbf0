"""Rows at different stages in one batch: some read their prompt, others write their answer.

In: embeddings of what each row has not yet read, and ids of what it writes. Out: logits. Every
row has a slot of its own in one buffer a layer, filled from the left; its length says how much of
the slot is its own, and a mask keeps it from reading further. A row is admitted without the
others being copied, and one that leaves is replaced by the last. Constant beginnings are held once
for all rows (`shared_prefix`): a row that stands behind one keeps in its slot only what follows.

Axes: N rows, K key heads, T tokens, D width of a head, H width of the model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from clover.language.decoder_only import DecoderOnly
from clover.language.shared_prefix import SharedPrefix, behind

KeyValues = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values of a stretch of one row, each `[K, T, D]`, layer by layer."""

_BLOCK = 64
"""Slots grow by so many tokens, so that a buffer is seldom copied."""


class RowBatch:
    """The rows that a decoder-only model is busy with.

    Args:
        language: The model; its layers must attend to everything before a token.
        max_rows: Slots at most.
    """

    def __init__(self, language: DecoderOnly, max_rows: int) -> None:
        self.language = language
        self.max_rows = max_rows
        self.lengths: list[int] = []
        """Tokens of each row, its constant beginning included."""
        self._cache = _SlotCache()
        self._constants: list[KeyValues] = []
        self._joined: SharedPrefix | None = None
        self._bases: list[int | None] = []

    def __len__(self) -> int:
        """Return how many rows there are."""
        return len(self.lengths)

    @property
    def can_share(self) -> bool:
        """Whether rows may stand behind a beginning that is held once."""
        return self.language.can_share_prefix

    def hold(self, constant: KeyValues) -> int:
        """Hold a constant beginning for rows to come; return its number for `admit`.

        Args:
            constant: Its keys and values, at the positions from 0 on.
        """
        assert self.can_share, "this model's rows each hold their own beginning"
        self._constants.append(constant)
        # One behind the other: a row sees its own alone. The positions are in the keys.
        layers = list(zip(*self._constants, strict=True))
        self._joined = SharedPrefix(
            tuple(torch.cat([keys for keys, _ in layer], dim=1) for layer in layers),
            tuple(torch.cat([values for _, values in layer], dim=1) for layer in layers),
        )
        return len(self._constants) - 1

    def _before(self, base: int | None) -> int:
        """Return how many tokens of a row stand outside its slot."""
        return 0 if base is None else self._constants[base][0][0].shape[1]

    @torch.no_grad()
    def admit(
        self,
        begun: Sequence[Sequence[KeyValues]],
        rest: Sequence[Tensor],
        bases: Sequence[int | None] | None = None,
    ) -> Tensor:
        """Take rows in and read their prompts as one pass.

        Args:
            begun: For each new row, stretches of keys and values that stand at its beginning,
                after its constant one.
            rest: For each new row, embeddings `[T, H]` of what follows, at least one.
            bases: For each new row the number of its constant beginning (`hold`), or none.

        Returns:
            The logits after each new row's prompt `[N, V]`, float32.
        """
        first, width = len(self.lengths), max(map(len, rest))
        own = [sum(part[0][0].shape[1] for part in parts) for parts in begun]
        self._cache.reserve(first + len(rest), max(own) + width, self.max_rows)
        for row, parts in enumerate(begun):
            self._cache.fill(first + row, parts)
        embeds = torch.zeros(len(rest), width, rest[0].shape[-1], dtype=rest[0].dtype)
        embeds = embeds.to(rest[0].device)
        for row, part in enumerate(rest):
            embeds[row, : len(part)] = part
        new = list(bases) if bases is not None else [None] * len(rest)
        starts = [self._before(base) + length for base, length in zip(new, own, strict=True)]
        hidden = self._run(first, starts, new, inputs_embeds=embeds)  # [N, T, H]
        # What a shorter row's padding wrote lies beyond its length and is written over.
        self.lengths += [start + len(part) for start, part in zip(starts, rest, strict=True)]
        self._bases += new
        last = torch.tensor([len(part) - 1 for part in rest], device=hidden.device)
        return self.language.logits(hidden[torch.arange(len(rest), device=hidden.device), last])

    @torch.no_grad()
    def step(self, ids: Sequence[int]) -> Tensor:
        """Append one token to every row and return the next logits `[N, V]`, float32."""
        self._cache.reserve(len(ids), max(self._own_lengths()) + 1, self.max_rows)
        tokens = torch.tensor([[token] for token in ids], device=self.language.device)
        hidden = self._run(0, self.lengths, self._bases, input_ids=tokens)
        self.lengths = [length + 1 for length in self.lengths]
        return self.language.logits(hidden[:, -1])

    def _own_lengths(self) -> list[int]:
        """Return how much of its slot each row fills."""
        return [
            length - self._before(base)
            for length, base in zip(self.lengths, self._bases, strict=True)
        ]

    def remove(self, row: int) -> int:
        """Let a row go; return the number of the row that now has its place (the last one's)."""
        last = len(self.lengths) - 1
        if row != last:
            self._cache.move(last, row, self._own_lengths()[last])
            self.lengths[row], self._bases[row] = self.lengths[last], self._bases[last]
        self.lengths.pop()
        self._bases.pop()
        if not self.lengths:
            self._cache.release()
        return last

    def copy_out(self, row: int, start: int, end: int) -> KeyValues:
        """Return a copy of a row's keys and values from token `start` to before `end`.

        `start` does not lie within a constant beginning that the row shares.
        """
        before = self._before(self._bases[row])
        assert start >= before, "what is held once is not in the slot"
        return self._cache.copy_out(row, start - before, end - before)

    def _run(
        self, first: int, starts: Sequence[int], bases: Sequence[int | None], **inputs: Tensor
    ) -> Tensor:
        width = next(iter(inputs.values())).shape[1]
        device = self.language.device
        own = [start - self._before(base) for start, base in zip(starts, bases, strict=True)]
        begins = torch.tensor(own, device=device)
        steps = torch.arange(width, device=device)
        places = begins[:, None] + steps  # [N, T], in the slot
        positions = torch.tensor(list(starts), device=device)[:, None] + steps  # [N, T]
        self._cache.open(first, own, width, begins)
        keys = torch.arange(max(own) + width, device=device)
        hides = keys[None, None, None, :] > places[:, None, :, None]  # [N, 1, T, keys]
        # Numbers, not booleans: each layer would turn those into numbers by itself.
        mask = torch.zeros(hides.shape, dtype=self.language.dtype, device=device)
        mask.masked_fill_(hides, -torch.inf)
        with behind(self._shared_by(bases)):
            return self.language.hidden(
                attention_mask=mask, position_ids=positions, past_key_values=self._cache, **inputs
            )

    def _shared_by(self, bases: Sequence[int | None]) -> SharedPrefix | None:
        """Return the constant beginnings with who may look at which."""
        if self._joined is None or all(base is None for base in bases):
            return None
        if len(self._constants) == 1 and None not in bases:
            return self._joined
        hidden = torch.ones(
            len(bases), self._joined.num_tokens, dtype=torch.bool, device=self.language.device
        )
        starts = [0, *accumulate(map(self._before, range(len(self._constants))))]
        for row, base in enumerate(bases):
            if base is not None:
                hidden[row, starts[base] : starts[base + 1]] = False
        return replace(self._joined, hidden=hidden)


def can_share_a_batch(language: Any) -> bool:
    """Return whether a model's rows may be at different stages: every layer sees the whole row."""
    if not isinstance(language, DecoderOnly):
        return False
    config = language.model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    is_windowed = bool(window) and getattr(config, "use_sliding_window", True)
    return kinds == {"full_attention"} and not is_windowed


class _SlotCache:
    """What a transformers model takes for its cache: it writes each row at its own place."""

    def __init__(self) -> None:
        self._layers: list[tuple[Tensor, Tensor]] = []  # each [slots, K, capacity, D]
        self._slots = self._capacity = 0
        self._first, self._starts, self._width = 0, [0], 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the longest row; positions are given, so nothing depends on it."""
        return max(self._starts)

    def open(self, first: int, starts: list[int], width: int, begins: Tensor) -> None:
        """Say which slots the next pass writes, and where each begins (list and tensor `[N]`)."""
        self._first, self._starts, self._width = first, starts, width
        self._begins = begins
        self._numbers = torch.arange(first, first + len(starts), device=begins.device)

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write `[N, K, T, D]` and return all that these rows may read."""
        while len(self._layers) <= layer_idx:
            shape = (self._slots, keys.shape[1], self._capacity, keys.shape[3])
            # Zeros, not garbage: a masked value still takes part in a sum, and 0 x NaN is NaN.
            self._layers.append((keys.new_zeros(shape), values.new_zeros(shape)))
        end = self._first + len(self._starts)
        longest = max(self._starts) + self._width
        pair = self._layers[layer_idx]
        for buffer, new in zip(pair, (keys, values), strict=True):
            if self._width == 1 and len(self._starts) > 1:
                buffer[self._numbers, :, self._begins] = new[:, :, 0]
            else:
                for row, start in enumerate(self._starts):
                    buffer[self._first + row, :, start : start + self._width] = new[row]
        return (
            pair[0][self._first : end, :, :longest],
            pair[1][self._first : end, :, :longest],
        )

    def reserve(self, slots: int, tokens: int, max_slots: int) -> None:
        """Make room for so many rows of so many tokens."""
        if slots <= self._slots and tokens <= self._capacity:
            return
        if slots > self._slots:
            slots = min(max(slots, 2 * self._slots), max(max_slots, slots))
        old_slots, old_capacity = self._slots, self._capacity
        self._slots = max(slots, self._slots)
        self._capacity = max(-(-tokens // _BLOCK) * _BLOCK, self._capacity)
        for index, pair in enumerate(self._layers):
            grown = []
            for buffer in pair:
                shape = (self._slots, buffer.shape[1], self._capacity, buffer.shape[3])
                larger = buffer.new_zeros(shape)
                larger[:old_slots, :, :old_capacity] = buffer
                grown.append(larger)
            self._layers[index] = (grown[0], grown[1])

    def fill(self, slot: int, parts: Sequence[KeyValues]) -> None:
        """Write stretches, one behind the other, to the beginning of a slot."""
        start = 0
        for part in parts:
            length = part[0][0].shape[1]
            for layer, (keys, values) in enumerate(part):
                if len(self._layers) <= layer:
                    shape = (self._slots, keys.shape[0], self._capacity, keys.shape[2])
                    self._layers.append((keys.new_zeros(shape), values.new_zeros(shape)))
                self._layers[layer][0][slot, :, start : start + length] = keys
                self._layers[layer][1][slot, :, start : start + length] = values
            start += length

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row into another slot."""
        for pair in self._layers:
            for buffer in pair:
                buffer[target, :, :length] = buffer[source, :, :length]

    def copy_out(self, slot: int, start: int, end: int) -> KeyValues:
        return tuple(
            (keys[slot, :, start:end].clone(), values[slot, :, start:end].clone())
            for keys, values in self._layers
        )

    def release(self) -> None:
        """Give the memory back: nobody is here, and the next rows may be short."""
        self._layers, self._slots, self._capacity = [], 0, 0
