"""Maps of where the queries looked, against loops written from the equations."""

from __future__ import annotations

import math

import pytest
import torch

from clover.core.config import QFormerConfig
from clover.core.errors import CloverError
from clover.qformer.attention import Attention
from clover.qformer.attention_map import attention_map, grid_side, weights_of
from clover.qformer.bridge import Bridge


def bridge(frequency: int = 1) -> Bridge:
    torch.manual_seed(0)
    config = QFormerConfig(
        hidden_size=16,
        num_layers=3,
        num_heads=4,
        intermediate_size=24,
        vocab_size=20,
        max_positions=12,
        encoder_width=10,
        num_queries=3,
        cross_attention_frequency=frequency,
        dropout=0.0,
        initializer_range=0.5,
    )
    return Bridge(config, language_width=8).eval()


IDS = torch.tensor([[2, 7, 9, 3, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 0]])


def test_weights_are_the_softmax_that_the_fast_kernel_applies() -> None:
    torch.manual_seed(1)
    module = Attention(8, num_heads=2, key_width=6, dropout=0.0, eps=1e-12)
    x, memory = torch.randn(1, 3, 8), torch.randn(1, 5, 6)
    keys = module.project(memory)
    found = weights_of(module, x, keys, None)
    wanted = torch.zeros(3, 5)
    for head in range(2):
        for row in range(3):
            asked = module.query(x)[0, row, head * 4 : head * 4 + 4]
            scores = torch.stack(
                [asked @ module.key(memory)[0, k, head * 4 : head * 4 + 4] for k in range(5)]
            )
            wanted[row] += torch.exp(scores / 2) / torch.exp(scores / 2).sum() / 2
    torch.testing.assert_close(found, wanted)
    # And they are what moves the values: with one head, weights @ values is the context.
    single = Attention(8, num_heads=1, key_width=6, dropout=0.0, eps=1e-12)
    keys = single.project(memory)
    context = weights_of(single, x, keys, None) @ keys[1][0, 0]
    torch.testing.assert_close(single.norm(x + single.output(context)), single(x, keys, None))


@pytest.mark.parametrize(("frequency", "layers"), [(1, 3), (2, 2)])
def test_every_map_has_the_image_s_shape_and_sums_to_one(frequency: int, layers: int) -> None:
    found = attention_map(bridge(frequency), torch.randn(1, 16, 10), IDS, MASK)
    assert found.weights.shape == (layers, 3, 4, 4) and found.rolled.shape == (3, 4, 4)
    for maps in (found.weights, found.rolled, found.mean(), found.rollout(), found.layer(-1)):
        torch.testing.assert_close(maps.sum(dim=(-1, -2)), torch.ones(maps.shape[:-2]))


def test_padding_of_the_question_changes_no_map() -> None:
    model, features = bridge(), torch.randn(1, 16, 10)
    padded = attention_map(model, features, IDS, MASK)
    plain = attention_map(model, features, IDS[:, :4], MASK[:, :4])
    torch.testing.assert_close(padded.weights, plain.weights)
    torch.testing.assert_close(padded.rolled, plain.rolled)


def test_the_map_leaves_the_pass_as_it_was() -> None:
    model, features = bridge(), torch.randn(1, 16, 10)
    before = model.visual_prefix(model.read_image(features), IDS, MASK)
    attention_map(model, features, IDS, MASK)
    torch.testing.assert_close(model.visual_prefix(model.read_image(features), IDS, MASK), before)
    assert not any(layer.attention._forward_pre_hooks for layer in model.qformer.layers)


def test_a_token_that_all_queries_seek_is_where_the_map_peaks() -> None:
    model, features = bridge(), torch.randn(1, 16, 10)
    # Keys of layer 0 are all zero but for token 6's, which points along every query.
    cross = model.qformer.layers[0].cross_attention
    with torch.no_grad():
        cross.query.weight.zero_()
        cross.query.bias.fill_(4.0)
        cross.key.bias.zero_()
        normed = model.vision_norm(features)[0]
        wanted = torch.zeros(16, 16)
        wanted[6] = 1.0
        cross.key.weight.copy_(torch.linalg.lstsq(normed, wanted).solution.T)
    found = attention_map(model, features, IDS, MASK)
    peaks = found.weights[0].flatten(1).argmax(dim=1)
    assert peaks.tolist() == [6, 6, 6]


def test_rollout_of_one_layer_without_text_is_its_cross_attention() -> None:
    torch.manual_seed(0)
    config = bridge().config.model_copy(update={"num_layers": 1})
    model = Bridge(config, language_width=8).eval()
    found = attention_map(model, torch.randn(1, 16, 10))
    torch.testing.assert_close(found.rolled, found.weights[0])


def test_a_class_token_is_no_place_and_other_counts_are_refused() -> None:
    assert [grid_side(count) for count in (16, 17, 196, 257)] == [4, 4, 14, 16]
    found = attention_map(bridge(), torch.randn(1, 17, 10), IDS, MASK)
    assert found.grid == 4 and math.isclose(float(found.mean().sum()), 1, rel_tol=1e-5)
    with pytest.raises(CloverError, match="12 image tokens form no square grid"):
        attention_map(bridge(), torch.randn(1, 12, 10), IDS, MASK)
