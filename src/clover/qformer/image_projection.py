"""Image keys and values of all layers, whose backward leaves out what nobody reads.

The image's features come from a frozen encoder: of their gradient only the two vectors of the
LayerNorm before the projections are wanted. With x = g n + c (n the normalised features, g and c
the LayerNorm's weight and bias) and y = x W' + b for each projection, the weight's gradient dW and
the bias's db, which are computed anyway, give both without the gradient of x:

    dc = sum over projections of W' db
    dg = (sum over projections and outputs of W * dW  -  c dc) / g

A matrix product as large as the forward one less: a third of the backward, four hundredths of a
stage-1 step at the published size.

Axes: N image tokens, E encoder width, D width of a projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from clover.core.linear import linear, multiply
from clover.core.number_format import as_multiplied, number_format, without_autocast

_LEAST = 1e-6  # a LayerNorm's weight so small that dividing by it would be worthless


class _Project(Function):
    @staticmethod
    def forward(
        context: Any,
        features: Tensor,
        gain: Tensor,
        shift: Tensor,
        eps: float,
        dtype: torch.dtype,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        with without_autocast(features.device):
            x = F.layer_norm(features, features.shape[-1:], gain, shift, eps).to(dtype)
            outputs = [
                linear(x, weight.to(dtype), bias.to(dtype))
                for weight, bias in zip(parameters[::2], parameters[1::2], strict=True)
            ]
        context.save_for_backward(x, features, gain, shift, *parameters[::2])
        context.eps = eps
        return tuple(outputs)

    @staticmethod
    def backward(context: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, features, gain, shift, *weights = context.saved_tensors
        rows = x.flatten(0, -2)
        found: list[Tensor | None] = []
        of_gain, of_shift = torch.zeros_like(gain), torch.zeros_like(shift)
        # Dividing a difference of like numbers loses the digits they share: where a shift is large
        # beside its gain, the products' rounding would be all that is left.
        least = _LEAST + 8 * torch.finfo(x.dtype).eps * shift.abs()
        is_tiny = bool((gain.abs() < least).any())
        of_x = torch.zeros_like(rows, dtype=gain.dtype) if is_tiny else None
        with without_autocast(x.device):
            for weight, grad in zip(weights, grads, strict=True):
                flat = grad.flatten(0, -2)
                of_weight = multiply(flat.t(), rows).to(weight.dtype)  # [D, E]
                of_bias = flat.sum(dim=0, dtype=weight.dtype)
                of_shift += of_bias @ weight
                if of_x is None:
                    of_gain += (of_weight * weight).sum(dim=0)  # einsum: D dot products apart
                else:
                    of_x += multiply(flat.to(weight.dtype), weight)
                found += [of_weight, of_bias]
            if of_x is None:
                of_gain = (of_gain - shift * of_shift) / gain
            else:
                normed = F.layer_norm(features, features.shape[-1:], eps=context.eps)
                of_gain = (of_x * normed.flatten(0, -2)).sum(dim=0)
        return None, of_gain, of_shift, None, None, *found


def project_images(
    features: Tensor, norm: nn.LayerNorm, layers: Sequence[nn.Linear]
) -> list[Tensor]:
    """Return each projection of the normalised features.

    Args:
        features: [..., N, E], without gradient.
        norm: The LayerNorm before all projections.
        layers: The projections [D, E].

    Returns:
        [..., N, D] each, in the products' number format.
    """
    is_plain = features.device.type != "cpu" or not torch.is_grad_enabled()
    if is_plain or features.requires_grad or not norm.weight.requires_grad:
        x = as_multiplied(norm(features))
        return [layer(x) for layer in layers]
    parameters = [item for layer in layers for item in (layer.weight, layer.bias)]
    return list(
        _Project.apply(
            features, norm.weight, norm.bias, norm.eps, number_format(features), *parameters
        )
    )
