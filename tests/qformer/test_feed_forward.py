"""A GELU that is computed again on the way back changes no bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clover.qformer.attention import FeedForward


def step(keeps_gelu: bool, *, is_low: bool) -> list[Tensor | None]:
    """Return output and gradients."""
    torch.manual_seed(0)
    module = FeedForward(8, inner=32, dropout=0.2, eps=1e-5, keeps_gelu=keeps_gelu)
    for item in module.children():
        if isinstance(item, nn.Linear):
            nn.init.normal_(item.weight)
    x = torch.randn(3, 5, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_low):
        found = module(x)
    found.square().sum().backward()
    assert x.grad is not None
    return [found.detach(), x.grad, *(item.grad for item in module.parameters())]


def test_it_changes_no_bit() -> None:
    for is_low in (False, True):
        plain = step(True, is_low=is_low)
        again = step(False, is_low=is_low)
        for ours, theirs in zip(again, plain, strict=True):
            assert ours is not None and theirs is not None and torch.equal(ours, theirs)
