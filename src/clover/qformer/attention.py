"""Multi-head attention with post-LayerNorm residual, as BERT has it (SPEC, section 1.3).

Axes: B batch, H heads, R rows (query side), K keys, D width.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clover.core.attend import attend
from clover.core.dropout import add_dropped
from clover.core.linear import Linear
from clover.core.number_format import as_multiplied

KeyValue = tuple[Tensor, Tensor]
"""Keys and values split into heads, each [B, H, K, D/H]."""


class Attention(nn.Module):
    """Attention from `width` to keys of `key_width`, with output projection, residual and norm."""

    def __init__(
        self, width: int, *, num_heads: int, key_width: int, dropout: float, eps: float
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not divisible by {num_heads} heads")
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = Linear(width, width)
        self.key = Linear(key_width, width)
        self.value = Linear(key_width, width)
        self.output = Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)

    def split(self, x: Tensor) -> Tensor:
        """[B, R, D] -> [B, H, R, D/H]."""
        batch, rows, width = x.shape
        return x.view(batch, rows, self.num_heads, width // self.num_heads).transpose(1, 2)

    def project(self, x: Tensor) -> KeyValue:
        """Return keys and values of `x` [B, K, key_width], each [B, H, K, D/H]."""
        x = as_multiplied(x)
        return self.split(self.key(x)), self.split(self.value(x))

    def forward(self, x: Tensor, keys: KeyValue, mask: Tensor | None) -> Tensor:
        """Attend.

        Args:
            x: Rows that ask [B, R, D]; also the residual.
            keys: Keys and values from `project`.
            mask: Boolean, True = may look, broadcastable to [B, H, R, K]; None = everything.

        Returns:
            [B, R, D].
        """
        probability = self.dropout if self.training else 0.0
        context = attend(self.split(self.query(x)), *keys, mask, dropout=probability)  # [B, R, D]
        normed: Tensor = self.norm(add_dropped(x, self.output(context), probability))
        return normed


class FeedForward(nn.Module):
    """BERT's feed-forward with exact GELU, residual and norm.

    Args:
        width: D.
        inner: Width between the two linear layers.
        dropout: Of the update.
        eps: Of the norm.
        keeps_gelu: Keep the GELU's output for the way back; otherwise it is computed again, which
            is a few thousandths of a step and a quarter of its activations.
    """

    def __init__(
        self, width: int, *, inner: int, dropout: float, eps: float, keeps_gelu: bool = False
    ) -> None:
        super().__init__()
        self.keeps_gelu = keeps_gelu
        self.dropout = dropout
        self.inner = Linear(width, inner)
        self.outer = Linear(inner, width)
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """[B, R, D] -> [B, R, D]."""
        inner = self.inner(x)
        activated = F.gelu(inner)
        # Neither has addresses; and a compiler decides for itself what it computes again.
        keeps = self.keeps_gelu or torch.compiler.is_compiling() or inner.is_meta
        keep = contextlib.nullcontext() if keeps else _computed_again(activated, inner)
        with keep:
            update = self.outer(activated)
        probability = self.dropout if self.training else 0.0
        normed: Tensor = self.norm(add_dropped(x, update, probability))
        return normed


@dataclass(frozen=True)
class _Gelu:
    """Stands for a GELU's output in a graph: what it came from [..., D], and its shape there."""

    inner: Tensor
    shape: torch.Size


def _computed_again(activated: Tensor, inner: Tensor) -> contextlib.AbstractContextManager[None]:
    """Within the block, let a graph keep `inner` where it would keep `activated` = GELU(inner)."""
    address = activated.data_ptr()

    def pack(saved: Tensor) -> Tensor | _Gelu:
        if saved.data_ptr() != address or saved.numel() != inner.numel():
            return saved
        return _Gelu(inner.detach(), saved.shape)

    def unpack(kept: Tensor | _Gelu) -> Tensor:
        return F.gelu(kept.inner).view(kept.shape) if isinstance(kept, _Gelu) else kept

    hooks: contextlib.AbstractContextManager[None] = torch.autograd.graph.saved_tensors_hooks(
        pack, unpack
    )
    return hooks


def join_keys(first: KeyValue | None, second: KeyValue) -> KeyValue:
    """Put cached keys and values before new ones along the key axis."""
    if first is None:
        return second
    return torch.cat([first[0], second[0]], dim=2), torch.cat([first[1], second[1]], dim=2)
