"""How tokens are kept: half precision, or a byte a number with one scale a token."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Storage = Literal["float16", "bfloat16", "int8"]
STORAGES: tuple[Storage, ...] = get_args(Storage)
_LARGEST = 127


def bytes_a_token(width: int, storage: Storage) -> int:
    """Return the bytes that a token of so many numbers takes as `pack` writes it."""
    return width + 4 if storage == "int8" else 2 * width


def pack(tokens: Tensor, storage: Storage) -> dict[str, Tensor]:
    """Return tokens [N, P, E] as they are written: `tokens`, and of int8 `scale` [N, P]."""
    if storage != "int8":
        return {"tokens": tokens.to(getattr(torch, storage)).contiguous()}
    tokens = tokens.float()
    scale = (tokens.abs().amax(dim=-1) / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    rounded = (tokens / scale[..., None]).round_().clamp_(-_LARGEST, _LARGEST)
    return {"tokens": rounded.to(torch.int8).contiguous(), "scale": scale.contiguous()}


def unpack(kept: dict[str, Tensor]) -> Tensor:
    """Return what `pack` made as float32."""
    tokens = kept["tokens"].float()
    return tokens * kept["scale"][..., None] if "scale" in kept else tokens


def are_finite(kept: dict[str, Tensor]) -> Tensor:
    """Return of which images of what `pack` made all numbers are finite [N]."""
    return torch.isfinite(kept.get("scale", kept["tokens"])).flatten(1).all(dim=1)
