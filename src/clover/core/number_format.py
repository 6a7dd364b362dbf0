"""Which number format products run in under autocast, and how to go there once for many of them."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def number_format(x: Tensor) -> torch.dtype:
    """Return the format that a product of `x` runs in: autocast's where it is on."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):  # meta knows no autocast
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def as_multiplied(x: Tensor) -> Tensor:
    """Return `x` in the format of its products; autocast itself would convert it for each."""
    return x.to(number_format(x))


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return the context in which every product keeps its operands' own format."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
