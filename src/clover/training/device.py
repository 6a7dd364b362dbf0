"""Which device, and which number format pays on it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from clover.core.config import Precision
from clover.core.errors import CloverError
from clover.core.processor import features


def multiplies_bfloat16_fast() -> bool:
    """Return whether this processor has bfloat16 matrix instructions (AMX or AVX-512 BF16).

    Without them bfloat16 is emulated: a third of float32's speed on the Ice Lake processor it was
    measured on (docs/benchmarks.md), so it must not be the default there.
    """
    return not features().isdisjoint(("amx_bf16", "avx512_bf16", "bf16"))


@dataclass(frozen=True)
class Device:
    """A torch device and the format that matrix products run in."""

    device: torch.device
    dtype: torch.dtype

    def put(self, tensor: Tensor) -> Tensor:
        """Return a tensor on this device; a GPU copies it when it comes to it."""
        if self.device.type == "cuda" and not tensor.is_cuda:
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the context for mixed precision: nothing for float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def choose_device(name: str = "auto", precision: Precision = "auto") -> Device:
    """Return the device and format of a recipe.

    Raises:
        CloverError: the named device is not there, or no such number format.
    """
    if precision not in get_args(Precision):
        raise CloverError(f"no precision '{precision}'; known: {', '.join(get_args(Precision))}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CloverError(f"device '{name}' is not usable here; try device: auto or cpu") from error
    if device.type == "cuda":
        # One GPU a process, also for threads and streams of its own: they go by the current one.
        if device.index is not None:
            torch.cuda.set_device(device)
        device = torch.device("cuda", torch.cuda.current_device())
    if precision == "auto":
        is_fast = device.type != "cpu" or multiplies_bfloat16_fast()
        precision = "bfloat16" if is_fast else "float32"
    return Device(device, getattr(torch, precision))
