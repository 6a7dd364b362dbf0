"""Softmax attention with dropout, forward and backward, as a training step on a processor needs it.

torch has no fused kernel for attention with dropout on the CPU, and its fused backward without
dropout is slower there than three batched products. This keeps, of what is as large as the scores,
the probabilities in the products' own format and a mask of one byte an element, or two.

Axes: B batch, H heads, R rows that ask, K keys, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from clover.core.dropout import keep_mask, kept
from clover.core.number_format import without_autocast


class _Attend(Function):
    @staticmethod
    def forward(
        context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        probability: float,
    ) -> Tensor:
        batch, heads, rows, width = query.shape
        with without_autocast(query.device):
            asked = (query * scale).reshape(-1, rows, width)
            key, value = (item.reshape(-1, item.shape[2], width) for item in (key, value))
            scores = torch.bmm(asked, key.transpose(1, 2))  # [B H, R, K]
            if mask is not None:
                by_head = scores.view(batch, heads, rows, -1)
                by_head.masked_fill_(~mask, torch.finfo(scores.dtype).min)
            weights = scores.softmax(dim=-1)
            keep, factor, used = None, 1.0, weights
            if probability:
                keep, factor = keep_mask(
                    weights.shape, probability, itemsize=weights.element_size()
                )
                used = kept(weights, keep)
            read = torch.bmm(used, value)
            if keep is not None:
                read.mul_(factor)
        context.save_for_backward(asked, key, value, weights, keep)
        context.scale, context.factor = scale, factor
        context.heads = heads
        return read.view(batch, heads, rows, width).transpose(1, 2).reshape(batch, rows, -1)

    @staticmethod
    @once_differentiable
    def backward(context: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        asked, key, value, weights, keep = context.saved_tensors
        _, rows, width = asked.shape
        heads = context.heads
        with without_autocast(grad.device):
            split = grad.view(grad.shape[0], rows, heads, width).transpose(1, 2)
            slope = split.reshape(-1, rows, width)
            used = weights
            if keep is not None:
                slope = slope * context.factor
                used = kept(weights, keep)
            of_value = torch.bmm(used.transpose(1, 2), slope)
            of_weights = torch.bmm(slope, value.transpose(1, 2))
            if keep is not None:
                of_weights = kept(of_weights, keep)
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_query = torch.bmm(of_scores, key).mul_(context.scale)
            of_key = torch.bmm(of_scores.transpose(1, 2), asked)
        of_query, of_key, of_value = (
            item.view(-1, heads, *item.shape[1:]) for item in (of_query, of_key, of_value)
        )
        return of_query, of_key, of_value, None, None, None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Attend, and put the heads side by side.

    Args:
        query: [B, H, R, D].
        key: [B, H, K, D].
        value: [B, H, K, D].
        mask: Boolean, True = may look, broadcastable to [B, H, R, K]; None = everything. A row
            must see something.
        dropout: Share of the probabilities that is dropped.
        scale: Of the scores; 1 / sqrt(D) where absent.

    Returns:
        [B, R, H D].
    """
    if query.device.type != "cpu" or not (dropout or torch.is_grad_enabled()):
        read = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale
        )
        return read.transpose(1, 2).flatten(2)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    read_here: Tensor = _Attend.apply(query, key, value, mask, scale, dropout)
    return read_here
