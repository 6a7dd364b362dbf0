"""Attention of our own beside torch's, and beside one that spells dropout out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clover.core.attend import attend
from clover.core.dropout import keep_mask


def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(3, 4, 5, 8), (3, 4, 7, 8), (3, 4, 7, 8)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def mask() -> Tensor:
    allowed = torch.rand(3, 1, 5, 7) > 0.4
    allowed[..., 0] = True
    return allowed


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_it_is_torchs_attention(is_masked: bool, scale: float | None) -> None:
    asked = tensors()
    allowed = mask() if is_masked else None
    found = attend(*asked, allowed, scale=scale)
    naive = F.scaled_dot_product_attention(*asked, attn_mask=allowed, scale=scale)
    naive = naive.transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, naive, rtol=1e-5, atol=1e-6)
    slope = torch.randn_like(naive)
    pairs = zip(
        torch.autograd.grad(found, asked, slope),
        torch.autograd.grad(naive, asked, slope),
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(attend(*asked, allowed, scale=scale), naive)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_dropout_it_is_the_formula(dtype: torch.dtype) -> None:
    asked = tensors(dtype)
    query, key, value = (item.detach().float().requires_grad_() for item in asked)
    allowed = mask()
    state = torch.get_rng_state()
    found = attend(*asked, allowed, dropout=0.3)
    torch.set_rng_state(state)
    keep, factor = keep_mask(torch.Size((12, 5, 7)), 0.3)
    scores = (query @ key.transpose(2, 3)) * 8**-0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
    expected = ((weights * keep.view(3, 4, 5, 7) * factor) @ value).transpose(1, 2).flatten(2)
    loose = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.05}
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, **loose)
    slope = torch.randn_like(expected)
    pairs = zip(
        torch.autograd.grad(found, asked, slope.to(dtype)),
        torch.autograd.grad(expected, (query, key, value), slope),
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.float(), theirs, **loose)
    torch.set_rng_state(state)
    with torch.no_grad():  # gradient caching runs once without a graph and once with one
        assert torch.equal(attend(*asked, allowed, dropout=0.3), found)
