"""Attention for training in bfloat16 beside the one transformers would have called."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from clover.language import shared_prefix


@pytest.mark.parametrize("is_masked", [False, True])
def test_heads_of_a_group_read_their_keys(is_masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 6, 5, 8, requires_grad=True)
    key, value = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(2))
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    mask = None
    if is_masked:  # the second row has a pad before it
        mask = causal.expand(2, 1, 5, 5).clone()
        mask[1, :, 1:, 0] = False
    repeated = [item.repeat_interleave(2, dim=1) for item in (key, value)]
    naive = F.scaled_dot_product_attention(
        query, *repeated, attn_mask=causal if mask is None else mask, scale=0.4
    )
    naive = naive.transpose(1, 2)
    # In float32, where it can be compared closely.
    monkeypatch.setattr(shared_prefix, "_is_slow_in_torch", lambda _: True)
    module = SimpleNamespace(layer_idx=0, num_key_value_groups=2)
    found, _ = shared_prefix.attend(module, query, key, value, mask, scaling=0.4)
    torch.testing.assert_close(found, naive, rtol=1e-5, atol=1e-6)
    slope = torch.randn_like(naive)
    pairs = zip(
        torch.autograd.grad(found, (query, key, value), slope),
        torch.autograd.grad(naive, (query, key, value), slope),
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_it_is_taken_for_learning_in_bfloat16_alone() -> None:
    low = torch.randn(1, dtype=torch.bfloat16, requires_grad=True)
    assert shared_prefix._is_slow_in_torch(low)
    assert not shared_prefix._is_slow_in_torch(low.detach())
    assert not shared_prefix._is_slow_in_torch(low.float())
    with torch.no_grad():
        assert not shared_prefix._is_slow_in_torch(low)
