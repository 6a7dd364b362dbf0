"""Linear layers whose float32 products take the faster of the two libraries torch brings.

On a CPU torch multiplies float32 by MKL, which leaves half of AMD's 512-bit units idle: 207 to 226
GFLOP/s on two cores of a fifth-generation EPYC (Zen 5) where oneDNN, which torch takes for
bfloat16, makes 360 to 490 of the same shapes (docs/training.md). Zen 4 computes 256 bits at a time
and gains little. The choice hangs on the processor and torch's own switch for oneDNN alone, so that
a run that goes on on another machine of the kind meets the same numbers.

Axes: N rows, K inputs, M outputs.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from clover.core import processor
from clover.core.number_format import number_format


@cache
def is_onednn_faster() -> bool:
    """Return whether float32 products are oneDNN's here: on AMD processors from Zen 5 on."""
    # AVX-512 came to AMD with Zen 4; this of its instructions, and the full width, with Zen 5.
    is_amd = processor.vendor() == "AuthenticAMD" and "avx512_vp2intersect" in processor.features()
    # Nothing is computed to find out: whoever asks first may be counting operations.
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return is_amd and has_onednn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Return `left @ right` ([N, K] and [K, M] -> [N, M]), without gradient.

    Both are of one number format and no broadcast views.
    """
    if _is_for_onednn(left, right.shape[0]):
        return _by_onednn(left, right.t())
    return left @ right


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias`, with gradient.

    Args:
        x: [..., K].
        weight: [M, K].
        bias: [M], or none.

    Returns:
        [..., M].
    """
    if not _is_for_onednn(x, weight.shape[-1]) or weight.dtype != torch.float32:
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return _by_onednn(x, weight, bias)
    product: Tensor = _Linear.apply(x, weight, bias)
    return product


class Linear(nn.Linear):
    """torch's linear layer, with `linear` for its product."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., M]."""
        return linear(input, self.weight, self.bias)


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a module is this linear layer or torch's own, and not one that is read apart.

    The output layer of torch's attention is a linear layer whose weight the attention takes.
    """
    return type(module) in (nn.Linear, Linear)


class _Linear(Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(x, weight)
        return _by_onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(context: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = context.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        of_x = of_weight = of_bias = None
        if context.needs_input_grad[0]:
            of_x = _by_onednn(flat, weight.t()).view_as(x)
        if context.needs_input_grad[1]:
            of_weight = _by_onednn(flat.t(), x.reshape(-1, x.shape[-1]).t())
        if context.needs_input_grad[2]:
            of_bias = flat.sum(dim=0)
        return of_x, of_weight, of_bias


def _is_for_onednn(x: Tensor, width: int) -> bool:
    return (
        # The device first, which a compiler knows; then the processor: on all others a layer has
        # nothing more to look at.
        x.device.type == "cpu"
        and is_onednn_faster()
        and x.dtype == torch.float32
        and x.numel() > 0
        and x.shape[-1] == width  # else torch says which shapes do not fit
        and number_format(x) == torch.float32
        and torch._C._get_mkldnn_enabled()  # `torch.backends.mkldnn.flags(enabled=False)`
    )


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # torch's own name for "by oneDNN, of plain weights"; no public one takes float32.
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
