"""A pre-LayerNorm vision transformer, as both encoders of BLIP-2 are one.

Axes: B batch, P tokens (class token first), E width, H heads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clover.core.linear import Linear


@dataclass(frozen=True)
class Shape:
    """Sizes of a vision transformer."""

    width: int
    depth: int
    """Blocks that are run."""
    num_heads: int
    inner: int
    """Width of the feed-forward layers."""
    patch: int = 14
    image_size: int = 224
    eps: float = 1e-6
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    has_patch_bias: bool = True
    has_first_norm: bool = False
    """CLIP normalises the embedded patches before the first block."""

    @property
    def num_tokens(self) -> int:
        """Patches and the class token."""
        return (self.image_size // self.patch) ** 2 + 1


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.is_quick = shape.activation == "quick_gelu"
        self.norm1 = nn.LayerNorm(shape.width, eps=shape.eps)
        self.qkv = Linear(shape.width, 3 * shape.width)
        self.projection = Linear(shape.width, shape.width)
        self.norm2 = nn.LayerNorm(shape.width, eps=shape.eps)
        self.inner = Linear(shape.width, shape.inner)
        self.outer = Linear(shape.inner, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, P, E] -> [B, P, E]."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, P, E/H]
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + self.projection(mixed.transpose(1, 2).reshape(batch, tokens, width))
        hidden = self.inner(self.norm2(x))
        hidden = hidden * torch.sigmoid(1.702 * hidden) if self.is_quick else F.gelu(hidden)
        result: Tensor = x + self.outer(hidden)
        return result


class VisionTransformer(nn.Module):
    """Patches, a class token and learned positions through the blocks; no last norm, no head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.patches = nn.Conv2d(
            3, shape.width, shape.patch, stride=shape.patch, bias=shape.has_patch_bias
        )
        self.class_token = nn.Parameter(torch.empty(1, 1, shape.width).normal_(std=0.02))
        positions = torch.empty(1, shape.num_tokens, shape.width).normal_(std=0.02)
        self.positions = nn.Parameter(positions)
        self.first_norm = nn.LayerNorm(shape.width, eps=shape.eps) if shape.has_first_norm else None
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, P, E], every token of the last block."""
        patches = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(patches), -1, -1), patches], dim=1)
        x = x + self.positions
        if self.first_norm is not None:
            x = self.first_norm(x)
        for block in self.blocks:
            x = block(x)
        return x


def own_name(
    name: str,
    *,
    prefix: re.Pattern[str],
    top: Mapping[str, str],
    block: re.Pattern[str],
    parts: Mapping[str, str],
) -> str | None:
    """Return this network's name of a checkpoint's tensor; None for what is not in it.

    Args:
        name: The checkpoint's.
        prefix: What may stand before every name.
        top: Names outside the blocks.
        block: A name within one: its number, the part, weight or bias.
        parts: The part's name there -> here.
    """
    name = prefix.sub("", name)
    if name in top:
        return top[name]
    found = block.match(name)
    if found is None or found[2] not in parts:
        return None
    return f"blocks.{found[1]}.{parts[found[2]]}.{found[3]}"


def resize_positions(name: str, found: Tensor, wanted: Tensor) -> Tensor:
    """Interpolate learned positions [1, P, E] to another number of patches; the class's is kept."""
    if name != "positions":
        return found
    found = found.reshape(1, -1, found.shape[-1])  # OpenAI's are [P, E]
    if found.shape == wanted.shape or found.shape[-1] != wanted.shape[-1]:
        return found
    first, grid = found[:, :1], found[:, 1:]
    old, new = int(grid.shape[1] ** 0.5), int((wanted.shape[1] - 1) ** 0.5)
    if old * old != grid.shape[1]:
        return found
    picture = grid.view(1, old, old, -1).permute(0, 3, 1, 2).float()
    picture = F.interpolate(picture, size=(new, new), mode="bicubic", align_corners=False)
    grid = picture.permute(0, 2, 3, 1).flatten(1, 2).to(found.dtype)
    return torch.cat([first, grid], dim=1)
