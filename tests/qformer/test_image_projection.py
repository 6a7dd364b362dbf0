"""Image projections beside the LayerNorm and linear layers that they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clover.qformer.image_projection import project_images


@pytest.mark.parametrize("zero", [False, True])
def test_outputs_and_gradients_are_those_of_the_layers(zero: bool) -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(32)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    if zero:  # by which nothing can be divided
        norm.weight.data[3] = 0
    layers = [nn.Linear(32, 16) for _ in range(4)]
    features = torch.randn(3, 7, 32)
    learning = [*norm.parameters(), *(item for layer in layers for item in layer.parameters())]
    slopes = [torch.randn(3, 7, 16) for _ in layers]
    found = project_images(features, norm, layers)
    naive = [layer(norm(features)) for layer in layers]
    for ours, theirs in zip(found, naive, strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(
        torch.autograd.grad(found, learning, slopes),
        torch.autograd.grad(naive, learning, slopes),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_in_bfloat16_products_the_norms_gradients_stay_near() -> None:
    torch.manual_seed(1)
    norm = nn.LayerNorm(64)
    norm.weight.data.uniform_(0.5, 2)
    norm.bias.data.normal_(std=3)
    layers = [nn.Linear(64, 48) for _ in range(3)]
    features = torch.randn(50, 64)
    slopes = [torch.randn(50, 48) for _ in layers]
    plain = torch.autograd.grad([f(norm(features)) for f in layers], [*norm.parameters()], slopes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = project_images(features, norm, layers)
    assert all(item.dtype == torch.bfloat16 for item in found)
    lower = [item.bfloat16() for item in slopes]
    for ours, theirs in zip(
        torch.autograd.grad(found, [*norm.parameters()], lower), plain, strict=True
    ):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02


def test_a_frozen_norm_and_no_gradient_take_the_plain_way() -> None:
    norm, layers = nn.LayerNorm(8), [nn.Linear(8, 4)]
    features = torch.randn(2, 8, requires_grad=True)
    (found,) = project_images(features, norm, layers)
    found.sum().backward()
    assert features.grad is not None
