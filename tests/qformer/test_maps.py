"""Attention maps against weights computed by hand."""

from __future__ import annotations

import pytest
import torch

from clover.core.config import QFormerConfig
from clover.qformer.bridge import Bridge
from clover.qformer.maps import attention_maps


def small(**more: int) -> Bridge:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "vocab_size": 30}
    sizes |= {"max_positions": 16, "encoder_width": 12, "num_queries": 3, "embedding_size": 8}
    config = QFormerConfig(
        **{"num_layers": 2, "cross_attention_frequency": 1, **sizes, **more},  # type: ignore[arg-type]
        dropout=0.0,
        initializer_range=0.5,
    )
    return Bridge(config, language_width=8).eval()


def by_hand(attention, x, source):  # type: ignore[no-untyped-def]
    """Softmax attention of one head after the other, from the equation."""
    queries, keys = attention.query(x)[0], attention.key(source)[0]
    width = queries.shape[-1] // attention.num_heads
    found = []
    for head in range(attention.num_heads):
        part = slice(head * width, (head + 1) * width)
        found.append(torch.softmax(queries[:, part] @ keys[:, part].T / width**0.5, dim=-1))
    return torch.stack(found).mean(dim=0)


def test_the_first_layers_map_is_softmax_attention_of_its_queries() -> None:
    bridge = small()
    image = torch.randn(1, 16, 12)
    maps = attention_maps(bridge, bridge.read_image(image))
    layer, qformer = bridge.qformer.layers[0], bridge.qformer
    x = qformer.embedding_norm(qformer.query_tokens)
    x = layer.attention(x, layer.attention.project(x), None)
    expected = by_hand(layer.cross_attention, x, bridge.vision_norm(image))
    torch.testing.assert_close(maps.layers[0].flatten(1), expected)
    assert maps.layers.shape == (2, 3, 4, 4)
    torch.testing.assert_close(maps.mean, (maps.layers[0] + maps.layers[1]) / 2)


def test_rollout_of_one_layer_is_its_cross_attention() -> None:
    bridge = small(num_layers=1)
    maps = attention_maps(bridge, bridge.read_image(torch.randn(1, 9, 12)))
    torch.testing.assert_close(maps.rollout, maps.layers[0])


def test_rollout_of_two_layers_follows_the_equation() -> None:
    bridge = small()
    image = torch.randn(1, 16, 12)
    maps = attention_maps(bridge, bridge.read_image(image))
    first, second = bridge.qformer.layers
    x = bridge.qformer.embedding_norm(bridge.qformer.query_tokens)
    keys = bridge.read_image(image).layers
    x, _ = first(x, num_queries=3, mask=None, image=keys[0])
    own = by_hand(second.attention, x, x)
    reach = 0.5 * maps.layers[0].flatten(1)
    reach = 0.5 * reach + 0.5 * own @ reach
    reach = 0.5 * reach + 0.5 * maps.layers[1].flatten(1)
    expected = reach / reach.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(maps.rollout.flatten(1), expected)


@pytest.mark.parametrize("places", [16, 17])
def test_maps_sum_to_one_with_a_question_and_with_a_class_token(places: int) -> None:
    bridge = small()
    ids, mask = torch.tensor([[1, 2, 3, 0]]), torch.tensor([[1, 1, 1, 0]])
    image = bridge.read_image(torch.randn(1, places, 12))
    maps = attention_maps(bridge, image, ids, mask)
    for found in (*maps.layers, maps.rollout):
        torch.testing.assert_close(found.flatten(1).sum(dim=1), torch.ones(3))
    other = attention_maps(bridge, image, torch.tensor([[4, 5, 6, 7]]), torch.ones(1, 4).long())
    assert not torch.allclose(maps.rollout, other.rollout)
