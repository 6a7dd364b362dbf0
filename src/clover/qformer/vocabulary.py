"""Cross-entropy over the vocabulary without ever holding all logits.

Loss and gradient are computed together, a block of rows at a time: of the [N, V] logits only one
block exists, and each is passed over as few times as can be. On two CPU cores this takes a fifth
off a stage-1 step at the phantom's size (docs/benchmarks.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from clover.core.linear import linear, multiply
from clover.core.number_format import as_multiplied

_ROWS = 128  # rows a block: 128 x 30523 float32 logits are 15 MB, which stays near the cache
_ROWS_DEVICE = 4096
"""Rows a block on a GPU, where a block's dozen kernels must be large to be worth their start."""
NO_TARGET = -100
"""Stands for the target of a row that has none."""


class _SmoothedCrossEntropy(Function):
    """Mean label-smoothed cross-entropy of `hidden @ weight.T + bias`."""

    @staticmethod
    def forward(
        context: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        target: Tensor,
        smoothing: float,
    ) -> Tensor:
        words = len(weight)
        block = _ROWS if hidden.device.type == "cpu" else _ROWS_DEVICE
        # Rows without a target come where nobody may wait to see how many they are (`caption`).
        has_target = None if hidden.device.type == "cpu" else target != NO_TARGET
        count: int | Tensor = len(hidden)
        if has_target is not None:
            count, target = has_target.sum().clamp_min(1), target.clamp_min(0)
        loss = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        grad_bias = torch.zeros_like(bias)
        for start in range(0, len(hidden), block):
            part = slice(start, start + block)
            rows, wanted = hidden[part], target[part, None]
            logits = linear(rows, weight, bias)  # [rows, V]
            scale = logits.float().logsumexp(dim=1)
            right = logits.gather(1, wanted).squeeze(1).float()
            # (1 - s) * (scale - right) + s * mean over words of (scale - logit)
            losses = scale - (1 - smoothing) * right
            if smoothing:
                losses -= smoothing * logits.mean(dim=1).float()
            loss += losses.sum() if has_target is None else (losses * has_target[part]).sum()
            slope = logits.sub_(scale[:, None].to(logits.dtype)).exp_()
            if smoothing:
                slope.sub_(smoothing / words)
            slope.scatter_add_(1, wanted, slope.new_full(wanted.shape, smoothing - 1))
            if has_target is not None:
                slope *= has_target[part, None]
            grad_hidden[part] = multiply(slope, weight)
            grad_weight.addmm_(slope.t(), rows)
            grad_bias += slope.sum(dim=0)
        context.save_for_backward(grad_hidden, grad_weight, grad_bias)
        context.count = count
        return loss / count

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factor = grad / context.count
        hidden, weight, bias = context.saved_tensors
        return hidden * factor, weight.mul_(factor), bias * factor, None, None


def vocabulary_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, *, smoothing: float
) -> Tensor:
    """Return the mean cross-entropy of predicting `target` from `hidden`.

    Args:
        hidden: [N, D].
        weight: Word embedding [V, D].
        bias: [V].
        target: Ids [N]; on a GPU `NO_TARGET` for rows that have none.
        smoothing: Share of the target spread over the whole vocabulary.
    """
    if len(hidden) == 0 or not torch.is_grad_enabled():
        logits = linear(hidden, weight, bias).float()
        return F.cross_entropy(logits, target, label_smoothing=smoothing, ignore_index=NO_TARGET)
    hidden = as_multiplied(hidden)
    loss: Tensor = _SmoothedCrossEntropy.apply(
        hidden, weight.to(hidden.dtype), bias.to(hidden.dtype), target, smoothing
    )
    return loss
