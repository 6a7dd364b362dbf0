"""Eight bits for an image encoder: the integers, no overflow, no neighbours, nearly the tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from clover.core.config import EncoderConfig
from clover.core.errors import CloverError
from clover.plan.step import encoder_size
from clover.vision.encoder import load_encoder
from clover.vision.quantise import Int8Linear, quantise

EVA = EncoderConfig(kind="eva_clip", model="vit_tiny_14", image_size=56, licence="MIT")


def naive(linear: nn.Linear, x: Tensor) -> Tensor:
    """The product of the rounded numbers, spelt out in float64."""
    weight, rows = linear.weight.detach().double(), x.double()
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    step = rows.abs().amax(dim=-1, keepdim=True) / 63
    product = ((rows / step).round() * step) @ ((weight / scale).round() * scale).T
    return product + linear.bias.detach().double()


def test_a_product_is_that_of_the_rounded_numbers() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(40, 24), torch.randn(2, 5, 40)
    found = Int8Linear(linear)(x)
    assert found.shape == (2, 5, 24)
    torch.testing.assert_close(found.double(), naive(linear, x), atol=1e-5, rtol=1e-5)


def test_the_largest_numbers_do_not_overflow() -> None:
    # Sums of two products in 16 bits saturate from 32768 on: 2 * 127 * 127 is just below.
    linear = nn.Linear(512, 8)
    nn.init.ones_(linear.weight)
    found = Int8Linear(linear)(torch.ones(3, 512))
    torch.testing.assert_close(found, 512 + linear.bias.expand(3, 8))


def test_a_token_does_not_depend_on_what_else_is_in_the_batch() -> None:
    encoder = load_encoder(EVA.model_copy(update={"numbers": "int8"}))
    pixels = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    pixels[1] *= 50
    alone = torch.cat([encoder.encode(item[None]) for item in pixels])
    torch.testing.assert_close(encoder.encode(pixels), alone, atol=1e-5, rtol=1e-5)


def test_tokens_are_nearly_those_of_float32_and_the_cache_keeps_them_apart() -> None:
    full, small = load_encoder(EVA), load_encoder(EVA.model_copy(update={"numbers": "int8"}))
    layers = [item for item in small.network.modules() if isinstance(item, Int8Linear)]  # type: ignore[attr-defined]
    assert len(layers) == 3 * 4
    assert full.revision != small.revision
    assert (full.num_tokens, full.width) == (small.num_tokens, small.width)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    first, second = full.encode(pixels), small.encode(pixels)
    assert 0 < (first - second).norm() / first.norm() < 0.05


def test_the_plan_counts_one_byte_a_weight() -> None:
    full = encoder_size(EVA, batch=1)
    small = encoder_size(EVA.model_copy(update={"numbers": "int8"}), batch=1)
    weights = 3 * (48 * 3 * 48 + 48 * 48 + 2 * 48 * 96)
    assert full.weights - small.weights == 3 * weights


def test_a_graphics_card_is_told_what_is_faster_there() -> None:
    with pytest.raises(CloverError, match=r"int8 is for a CPU.*runs on cuda.*numbers=bfloat16"):
        quantise(nn.Linear(2, 2), torch.device("cuda"))


def test_a_torch_without_integer_products_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> None:
        raise RuntimeError("Could not run 'onednn::qlinear_prepack' with arguments")

    # As a build without oneDNN answers: it knows the name of the operation and cannot run it.
    monkeypatch.setattr(torch.ops.onednn, "qlinear_prepack", absent)
    with pytest.raises(CloverError, match=r"int8 needs a torch .* oneDNN.*numbers=float32"):
        quantise(torch.nn.Sequential(torch.nn.Linear(8, 8)), torch.device("cpu"))
