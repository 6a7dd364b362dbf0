"""Our linear layer gives torch's numbers, whichever library multiplies them."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clover.core import linear as ours
from clover.core import processor
from clover.core.linear import Linear, is_linear, linear, multiply


@pytest.fixture(params=[False, True])
def by_onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether oneDNN multiplies, on any processor that torch has it for."""
    if request.param and not torch._C._has_mkldnn:
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(ours, "is_onednn_faster", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize("shape", [(40,), (7, 40), (3, 7, 40)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_product_and_gradients_are_torchs(
    by_onednn: bool, shape: tuple[int, ...], has_bias: bool
) -> None:
    torch.manual_seed(0)
    layer = Linear(40, 24, bias=has_bias)
    x = torch.randn(shape, requires_grad=True)
    found, expected = layer(x), F.linear(x, layer.weight, layer.bias)
    assert type(found.grad_fn).__name__.startswith("_Linear") == by_onednn
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    leaves = [x, *layer.parameters()]
    slope = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(found, leaves, slope),
        torch.autograd.grad(expected, leaves, slope),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_no_gradient_is_computed_that_nobody_wants(by_onednn: bool) -> None:
    layer = Linear(6, 4)
    layer.weight.requires_grad_(False)
    x = torch.randn(5, 6, requires_grad=True)
    total = layer(x).sum()
    with mock.patch.object(ours, "_by_onednn", wraps=ours._by_onednn) as products:
        total.backward()
    assert products.call_count == (1 if by_onednn else 0)  # that of x; the bias's is a sum
    assert layer.weight.grad is None
    torch.testing.assert_close(x.grad, layer.weight.sum(dim=0).expand(5, 6))
    assert layer.bias.grad is not None


def test_any_strides_multiply(by_onednn: bool) -> None:
    torch.manual_seed(1)
    left, right = torch.randn(40, 24), torch.randn(56, 40)
    expected = left.double().t() @ right.double().t()
    torch.testing.assert_close(
        multiply(left.t(), right.t()), expected.float(), atol=1e-5, rtol=1e-5
    )


def test_other_number_formats_stay_torchs(by_onednn: bool) -> None:
    layer = Linear(6, 4)
    x = torch.randn(5, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, F.linear(x, layer.weight, layer.bias))
    exact = layer.double()(x.double())
    assert exact.dtype == torch.float64 and not type(exact.grad_fn).__name__.startswith("_Linear")
    assert linear(torch.empty(0, 6), torch.ones(4, 6)).shape == (0, 4)
    assert Linear(6, 4, device="meta")(torch.empty(5, 6, device="meta")).shape == (5, 4)


@pytest.mark.parametrize(
    ("maker", "flags", "wanted"),
    [
        ("AuthenticAMD", "avx2 avx512f avx512_vp2intersect", True),
        ("AuthenticAMD", "avx2 avx512f avx512_bf16", False),
        ("GenuineIntel", "avx512f avx512_vp2intersect amx_bf16", False),
        ("", "", False),
    ],
)
def test_onednn_is_for_amd_from_zen_5_on(
    maker: str, flags: str, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "vendor", lambda: maker)
    monkeypatch.setattr(processor, "features", lambda: frozenset(flags.split()))
    found = ours.is_onednn_faster.__wrapped__()
    assert found == (wanted and torch._C._has_mkldnn)


def test_whoever_asks_first_the_answer_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(processor, "features", lambda: frozenset(["avx512_vp2intersect"]))
    with torch.device("meta"):
        counting = ours.is_onednn_faster.__wrapped__()
    assert counting == ours.is_onednn_faster.__wrapped__() == torch._C._has_mkldnn
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not ours.is_onednn_faster.__wrapped__()


@pytest.mark.filterwarnings("ignore:TF32")  # which torch says when the switch goes back
def test_torchs_own_switch_and_its_own_words_are_kept(by_onednn: bool) -> None:
    layer, x = Linear(6, 4), torch.randn(5, 6)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not type(layer(x).grad_fn).__name__.startswith("_Linear")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.randn(5, 7))


def test_what_counts_as_a_linear_layer() -> None:
    attention = nn.MultiheadAttention(8, 2)
    assert is_linear(Linear(2, 2)) and is_linear(nn.Linear(2, 2))
    assert not is_linear(attention.out_proj) and not is_linear(nn.LayerNorm(2))
