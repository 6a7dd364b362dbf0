"""Linear layers in float32 on a processor where torch's own matrix product is not the quickest.

torch multiplies float32 by MKL. On AMD processors with AVX-512 oneDNN, which torch carries too, is
quicker forward and towards the input by a tenth to a fifth. Within `quick_products` the layers of
a frozen model that is learnt through go that way; up to rounding nothing else changes.
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class _Linear(Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = context.saved_tensors
        return _product(grad.contiguous(), weight.t(), None), None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x @ weight.T + bias`."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


class _Quick(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is F.linear and not kwargs and _is_meant(*args):
            return _Linear.apply(*args, *[None] * (3 - len(args)))
        return function(*args, **(kwargs or {}))


def _is_meant(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Return whether a layer is a frozen one in float32 on the CPU, and learnt through."""
    return (
        type(x) is Tensor
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and torch.is_grad_enabled()
        and x.requires_grad
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and not torch.is_autocast_enabled("cpu")
    )


def quick_products() -> contextlib.AbstractContextManager[object]:
    """Return the context in which frozen layers in float32 take this processor's quicker way."""
    return _Quick() if is_onednn_quicker() else contextlib.nullcontext()


@functools.cache
def is_onednn_quicker() -> bool:
    """Return whether this is a processor on which oneDNN was measured to be the quicker one."""
    try:
        description = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "AuthenticAMD" in description and " avx512f " in description and _can_multiply()


def _can_multiply() -> bool:
    """Return whether this build of torch multiplies by oneDNN, and right."""
    try:
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(rows, 48, generator=generator) for rows in (5, 32))
        found = _product(x, weight, None), _product(x @ weight.t(), weight.t(), None)
    except (AttributeError, RuntimeError):
        return False
    product = x @ weight.t()
    return all(
        torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3)
        for ours, theirs in zip(found, (product, product @ weight), strict=True)
    )
