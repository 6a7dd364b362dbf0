"""Cheap dropout drops what it says, independently, and resumes with torch's random state."""

from __future__ import annotations

import math

import pytest
import torch

from clover.core.dropout import add_dropped, keep_mask, kept


@pytest.mark.parametrize("probability", [0.1, 0.3, 0.9])
def test_the_share_kept_is_that_asked_for(probability: float) -> None:
    torch.manual_seed(0)
    keep, factor = keep_mask(torch.Size((999, 1003)), probability)
    assert keep.shape == (999, 1003) and set(keep.unique().tolist()) == {0, 1}
    count = keep.numel()
    share = 1 / factor
    assert abs(share - (1 - probability)) <= 2**-17
    deviation = math.sqrt(share * (1 - share) / count)
    assert abs(float(keep.double().mean()) - share) < 4 * deviation


def test_neighbours_are_independent() -> None:
    torch.manual_seed(1)
    keep, factor = keep_mask(torch.Size((1_000_000,)), 0.5)
    signs = keep.double() * 2 - 1
    assert factor == 2
    for distance in (1, 2, 3, 4, 5, 8):  # four masks come from one random number
        correlation = float((signs[distance:] * signs[:-distance]).mean())
        assert abs(correlation) < 5e-3, distance


def test_the_random_state_of_torch_resumes_it() -> None:
    torch.manual_seed(2)
    state = torch.get_rng_state()
    first = keep_mask(torch.Size((5, 7)), 0.2)[0]
    second = keep_mask(torch.Size((5, 7)), 0.2)[0]
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(keep_mask(torch.Size((5, 7)), 0.2)[0], first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_and_its_gradients_are_those_of_the_mask(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x = torch.randn(6, 5, requires_grad=True)
    update = torch.randn(6, 5).to(dtype).requires_grad_()
    state = torch.get_rng_state()
    found = add_dropped(x, update, 0.4)
    torch.set_rng_state(state)
    keep, factor = keep_mask(update.shape, 0.4)
    expected = x + update.float() * keep * factor
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    slope = torch.randn(6, 5)
    for ours, theirs in zip(
        torch.autograd.grad(found, (x, update), slope),
        torch.autograd.grad(expected, (x, update), slope),
        strict=True,
    ):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6
        )


def test_nothing_is_dropped_outside_training() -> None:
    x, update = torch.randn(3), torch.randn(3)
    assert torch.equal(add_dropped(x, update, 0.0), x + update)


def test_the_mask_is_the_same_for_numbers_of_any_size() -> None:
    masks = []
    for itemsize in (1, 2, 4):
        torch.manual_seed(4)
        masks.append(keep_mask(torch.Size((5, 7)), 0.4, itemsize=itemsize)[0])
    assert all(torch.equal(mask.bool(), masks[0].bool()) for mask in masks)
    assert masks[1].dtype == torch.int16 and masks[2].dtype == torch.int8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_kept_is_what_where_gives(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    x = torch.randn(6, 7).to(dtype)
    x[0] = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-30, -3.0]).to(dtype)
    keep = torch.rand(7, 6) < 0.5
    for values, mask in ((x, keep.t()), (x.t(), keep), (x[:, 1:5], keep.t()[:, 1:5])):
        expected = torch.where(mask, values, values.new_zeros(()))
        found = kept(values, mask.to(torch.int8))
        assert found.dtype == dtype
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())
