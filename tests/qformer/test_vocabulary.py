"""The vocabulary loss in blocks is the plain cross-entropy, gradients too."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from clover.qformer.vocabulary import vocabulary_loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [1, 128, 300])
def test_blocks_equal_the_plain_loss(rows: int, smoothing: float) -> None:
    torch.manual_seed(0)
    target = torch.randint(0, 50, (rows,))
    results = []
    for is_fast in (True, False):
        torch.manual_seed(1)
        hidden, weight, bias = (
            torch.randn(*shape, requires_grad=True) for shape in ((rows, 8), (50, 8), (50,))
        )
        if is_fast:
            loss = vocabulary_loss(hidden, weight, bias, target, smoothing=smoothing)
        else:
            logits = F.linear(hidden, weight, bias)
            loss = F.cross_entropy(logits, target, label_smoothing=smoothing)
        (3 * loss).backward()
        results.append([loss.detach(), hidden.grad, weight.grad, bias.grad])
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
