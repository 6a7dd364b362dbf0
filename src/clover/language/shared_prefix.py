"""Attention over a beginning that every row of a batch shares.

In: keys and values of the constant text before the image, computed once, one row of them. Out:
attention of every row over that beginning and over its own tokens, as if each row held a copy. No
copy is made: the queries of all rows meet the shared keys in one matrix product, and the cache of a
row holds only what is its own. Worked examples before the image then cost next to nothing.

The softmax runs over both parts together, so the result is that of the plain way up to rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clover.core.attend import attend as attend_rows
from clover.language.packed import active_rows, attend_packed

_CAUSAL = "clover_causal"
"""The same attention for batches without a mask."""
NAME = "clover_shared_prefix"
"""Under which transformers knows this attention."""


@dataclass(frozen=True)
class SharedPrefix:
    """Keys and values of P tokens, `[num_kv_heads, P, head_dim]` a layer."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    hidden: Tensor | None = None
    """`[B, P]`, True where a row may not look; none where every row sees all of it."""

    @property
    def num_tokens(self) -> int:
        """How many tokens stand before every row, P."""
        return int(self.keys[0].shape[1])

    def layer(self, index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values, each `[K, P, d]`."""
        return self.keys[index].to(dtype), self.values[index].to(dtype)

    @classmethod
    def from_cache(cls, cache: Any) -> SharedPrefix:
        """Take what a transformers cache of one row holds."""
        return cls(
            tuple(layer.keys[0] for layer in cache.layers),
            tuple(layer.values[0] for layer in cache.layers),
        )


_ACTIVE: ContextVar[SharedPrefix | None] = ContextVar("shared_prefix", default=None)


@contextlib.contextmanager
def behind(prefix: SharedPrefix | None) -> Iterator[None]:
    """Let models prepared by `share_prefix` read `prefix` before each row's own tokens."""
    token = _ACTIVE.set(prefix)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def active_prefix() -> SharedPrefix | None:
    """Return the beginning that stands before every row now."""
    return _ACTIVE.get()


def share_prefix(model: Any) -> bool:
    """Prepare a causal language model for `behind`; return whether it can.

    A model that looks back only so far, or that bends its scores, keeps its own attention.
    """
    config = model.config
    bent = (
        "attn_logit_softcapping",
        "sliding_window",
        "alibi",
        "use_alibi",
        "attention_chunk_size",
    )
    if any(getattr(config, name, None) for name in bent):
        return False
    # Rotary positions are given with the tokens; learnt ones some models count for themselves.
    is_rotary = getattr(config, "rope_parameters", None) is not None
    if not is_rotary or not getattr(model, "_supports_attention_backend", False):
        return False
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def mask(*given: Any, **named: Any) -> Any:
        # Packed rows know for themselves what they see: no mask of all tokens by all tokens.
        return None if active_rows() is not None else sdpa_mask(*given, **named)

    AttentionInterface.register(NAME, attend)
    AttentionInterface.register(_CAUSAL, attend)
    AttentionMaskInterface.register(NAME, mask)
    model.set_attn_implementation(NAME)
    return True


@contextlib.contextmanager
def causal_by_itself(model: Any) -> Iterator[None]:
    """Within the block, have no mask made for a batch without one: all rows are causal.

    transformers looks whether positions are those of packed rows, which waits for the device. It
    does not for an attention that it knows no masks of.
    """
    model.set_attn_implementation(_CAUSAL)
    try:
        yield
    finally:
        model.set_attn_implementation(NAME)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: `[B, heads, T, d]` over `[B, num_kv_heads, S, d]`.

    Returns:
        `[B, T, heads, d]`, and no weights.
    """
    prefix, rows = _ACTIVE.get(), active_rows()
    if rows is not None:
        assert attention_mask is None, "packed rows have masks of their own"
        before = None if prefix is None else prefix.layer(module.layer_idx, query.dtype)
        return attend_packed(query, key, value, rows=rows, before=before, scale=scaling), None
    if prefix is None and _is_slow_in_torch(query):
        dropout = other.get("dropout", 0.0)
        return _attend_grouped(query, key, value, attention_mask, scaling, dropout), None
    if prefix is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **other
        )
        return output, None
    before_keys, before_values = prefix.layer(module.layer_idx, query.dtype)  # [K, P, d]
    batch, heads, length, width = query.shape
    groups = before_keys.shape[0]
    queries = heads // groups * length
    scale = width**-0.5 if scaling is None else scaling
    # Heads first: the queries of all rows are one matrix before the keys that they share.
    own_query = query.reshape(batch, groups, queries, width).transpose(0, 1) * scale  # [K, B, R, d]
    all_queries = own_query.reshape(groups, batch * queries, width)
    shared = (all_queries @ before_keys.transpose(1, 2)).view(groups, batch, queries, -1)
    if prefix.hidden is not None:
        shared = shared.masked_fill(prefix.hidden[None, :, None], -torch.inf)
    own = own_query @ key.permute(1, 0, 3, 2)  # [K, B, R, S]
    hidden = _hidden(attention_mask, length, key.shape[2], query.device)
    if hidden is not None:
        by_place = own.view(groups, batch, -1, length, key.shape[2])
        own = by_place.masked_fill(hidden, -torch.inf).view_as(own)
    weights = torch.cat([shared, own], dim=-1).softmax(dim=-1, dtype=torch.float32)
    weights = weights.to(query.dtype)
    num_before = shared.shape[-1]
    output = (weights[..., :num_before].flatten(1, 2) @ before_values).view_as(own_query)
    output = output + weights[..., num_before:] @ value.transpose(0, 1)
    return output.transpose(0, 1).reshape(batch, heads, length, width).transpose(1, 2), None


def _is_slow_in_torch(query: Tensor) -> bool:
    """Return whether torch's fused attention is the slower one: its backward in bfloat16 on a CPU.

    Three times slower than batched products, where those run in bfloat16 at all.
    """
    is_learning = torch.is_grad_enabled() and query.requires_grad
    return is_learning and query.device.type == "cpu" and query.dtype == torch.bfloat16


def _attend_grouped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """Attend `[B, heads, T, d]` to `[B, K, S, d]` without copies of keys for a group's heads.

    Returns:
        `[B, T, heads, d]`.
    """
    batch, heads, length, width = query.shape
    groups, size = key.shape[1], key.shape[2]
    together = heads // groups
    hidden = _hidden(mask, length, size, query.device)
    seen = None
    if hidden is not None:
        # [1, B or 1, 1, T, S] or [T, S] to rows of all heads of a group.
        seen = ~hidden.view(-1, 1, length, size).repeat(1, 1, together, 1)
    read = attend_rows(
        query.reshape(batch, groups, together * length, width),
        key,
        value,
        seen,
        dropout=dropout,
        scale=scale,
    )
    by_head = read.view(batch, together, length, groups, width).permute(0, 2, 3, 1, 4)
    return by_head.reshape(batch, length, heads, width)


def _hidden(mask: Tensor | None, length: int, size: int, device: torch.device) -> Tensor | None:
    """Return what may not be seen, for `[K, B, heads a group, T, S]`; None for nothing."""
    if mask is not None:
        mask = mask[..., :size]
        # Causal masks come as booleans (True = seen) or as numbers to be added.
        return (~mask if mask.dtype == torch.bool else mask < 0)[None]
    if length == 1:
        return None
    # transformers leaves the mask out where it is causal over all that there is.
    seen = torch.ones(length, size, dtype=torch.bool, device=device).tril(size - length)
    return ~seen
