"""Multi-head attention with post-LayerNorm residual, as BERT has it (SPEC, section 1.3).

Axes: B batch, H heads, R rows (query side), K keys, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(key_width, width)
        self.value = nn.Linear(key_width, width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)

    def split(self, x: Tensor) -> Tensor:
        """[B, R, D] -> [B, H, R, D/H]."""
        batch, rows, width = x.shape
        return x.view(batch, rows, self.num_heads, width // self.num_heads).transpose(1, 2)

    def project(self, x: Tensor) -> KeyValue:
        """Return keys and values of `x` [B, K, key_width], each [B, H, K, D/H]."""
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
        context = F.scaled_dot_product_attention(
            self.split(self.query(x)), *keys, attn_mask=mask, dropout_p=probability
        )
        context = context.transpose(1, 2).flatten(2)  # [B, R, D]
        update = F.dropout(self.output(context), self.dropout, self.training)
        normed: Tensor = self.norm(x + update)
        return normed


class FeedForward(nn.Module):
    """BERT's feed-forward with exact GELU, residual and norm."""

    def __init__(self, width: int, *, inner: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.inner = nn.Linear(width, inner)
        self.outer = nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """[B, R, D] -> [B, R, D]."""
        update = self.outer(F.gelu(self.inner(x)))
        normed: Tensor = self.norm(x + F.dropout(update, self.dropout, self.training))
        return normed


def join_keys(first: KeyValue | None, second: KeyValue) -> KeyValue:
    """Put cached keys and values before new ones along the key axis."""
    if first is None:
        return second
    return torch.cat([first[0], second[0]], dim=2), torch.cat([first[1], second[1]], dim=2)
