"""A cache of keys and values that has room to grow, for the loop that writes answers.

In: the cache of a constant prefix, one row. Out: the same for B rows, with room behind it, so that
a step writes its own column in place. transformers' own cache is copied whole at every layer and
step: with 250 tokens of worked examples before the image that was a quarter of an evaluation.

Not for training: what is written in place cannot be differentiated through.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

_MORE = 32
"""Columns added when a row grows beyond the room it was given."""


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [B, heads, T, d] of one layer: views of buffers that are longer than T."""

    def __init__(self, keys: Tensor, values: Tensor, *, num_rows: int, room: int) -> None:
        """Copy the keys and values [1, heads, P, d] of a prefix to `num_rows` rows."""
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self.keys = keys.expand(num_rows, -1, -1, -1)
        self.values = values.expand(num_rows, -1, -1, -1)
        self._make_room(room)

    def _make_room(self, room: int) -> None:
        length = self.keys.shape[-2]
        self._buffers = []
        for held in (self.keys, self.values):
            buffer = held.new_empty(*held.shape[:2], length + room, held.shape[-1])
            buffer[:, :, :length] = held
            self._buffers.append(buffer)
        self._show(length)

    def _show(self, length: int) -> None:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append columns [B, heads, T', d]; return everything so far."""
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        # Rows that were dropped, or repeated, left the buffers behind.
        is_held = self.keys.data_ptr() == self._buffers[0].data_ptr()
        if not is_held or end > self._buffers[0].shape[-2]:
            self._make_room(end - start + _MORE)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self._show(end)
        return self.keys, self.values


def with_room(cache: Any, *, num_rows: int, room: int) -> Any | None:
    """Return a copy of a one-row cache with `num_rows` rows and room for `room` more columns.

    None for a cache of another kind (sliding windows, states): such a one is copied as it is.
    """
    from transformers import DynamicCache

    if torch.is_grad_enabled() or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    grown = DynamicCache()
    grown.layers = [
        RoomyLayer(layer.keys, layer.values, num_rows=num_rows, room=room) for layer in cache.layers
    ]
    return grown
