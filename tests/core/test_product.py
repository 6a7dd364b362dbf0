"""Linear layers by oneDNN beside torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from clover.core import product
from clover.core.product import _Quick


def layer(*, bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 20, bias=bias).requires_grad_(False)


def learnt(made: nn.Linear, x: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    out = made(x)
    return out.detach(), torch.autograd.grad(out, x, slope)[0]


@pytest.mark.skipif(not product._can_multiply(), reason="this torch has no oneDNN")
def test_an_input_may_lie_in_any_order() -> None:
    made = layer(bias=True)
    x = torch.randn(48, 3, 5).permute(2, 1, 0)
    torch.testing.assert_close(product._product(x, made.weight, made.bias), made(x))


@pytest.mark.skipif(not product._can_multiply(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7,), (2, 5), (1, 1)])
def test_output_and_gradients_are_those_of_torch(shape: tuple[int, ...], bias: bool) -> None:
    made = layer(bias=bias)
    x = torch.randn(*shape, 48).requires_grad_()
    slope = torch.randn(20, *shape).movedim(0, -1)  # as attention's gradients lie
    plain = learnt(made, x, slope)
    with _Quick():
        assert "_Linear" in type(made(x).grad_fn).__name__
        found = learnt(made, x, slope)
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_only_frozen_float32_that_is_learnt_through_goes_that_way() -> None:
    made = layer(bias=False)
    x = torch.randn(3, 48)
    with _Quick():
        assert made(x).grad_fn is None
        asked = x.clone().requires_grad_()
        with torch.no_grad():
            assert made(asked).grad_fn is None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert "_Linear" not in type(made(asked).grad_fn).__name__
        learns = layer(bias=False).requires_grad_()
        assert "_Linear" not in type(learns(asked).grad_fn).__name__
        half = layer(bias=False).to(torch.bfloat16)
        low = half(x.bfloat16().requires_grad_())
        assert low.dtype == torch.bfloat16 and "_Linear" not in type(low.grad_fn).__name__
