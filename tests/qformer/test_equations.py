"""The fast Q-Former and losses against the naive ones: values and gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clover.align.losses import LossSettings, alignment_losses
from clover.align.match import Negatives, negative_weights, sample_negatives
from clover.core.config import QFormerConfig
from clover.qformer.bridge import Bridge
from clover.qformer.tokenizer import Tokens
from reference.naive_qformer import Naive, layer_norm, naive_losses

DECODE_START = 10


@dataclass
class Case:
    bridge: Bridge
    features: Tensor
    text: Tokens
    negatives: Negatives


def make_case(
    lengths: list[int], *, seed: int, queries: int = 3, places: int = 4, layers: int = 2,
    frequency: int = 2,
) -> Case:  # fmt: skip
    torch.manual_seed(seed)
    config = QFormerConfig(
        hidden_size=8,
        num_layers=layers,
        num_heads=2,
        intermediate_size=12,
        vocab_size=DECODE_START + 1,
        max_positions=12,
        encoder_width=5,
        num_queries=queries,
        cross_attention_frequency=frequency,
        embedding_size=6,
        dropout=0.0,
        # Wide weights: with 0.02 every softmax is flat and a wrong mask would hardly show.
        initializer_range=0.5,
    )
    bridge = Bridge(config, language_width=7, has_alignment=True, temperature=0.2).double().eval()
    size, width = len(lengths), max(lengths)
    mask = torch.zeros(size, width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    ids = torch.randint(1, DECODE_START, (size, width)) * mask
    shift = torch.randint(1, size, (2, size))
    other = (torch.arange(size) + shift) % size
    features = torch.randn(size, places, 5, dtype=torch.float64)
    return Case(bridge, features, Tokens(ids, mask), Negatives(other[0], other[1]))


def naive_of(bridge: Bridge) -> tuple[Naive, dict[str, Tensor]]:
    parameters = dict(bridge.named_parameters())
    config = bridge.config
    naive = Naive(
        {k.removeprefix("qformer."): v for k, v in parameters.items() if k.startswith("qformer.")},
        config.num_layers,
        config.num_heads,
        config.num_queries,
        config.cross_attention_frequency,
    )
    heads = {k.removeprefix("heads."): v for k, v in parameters.items() if k.startswith("heads.")}
    return naive, heads


def normed_images(bridge: Bridge, features: Tensor) -> list[Tensor]:
    parameters = dict(bridge.named_parameters())
    return [layer_norm(image, parameters, "vision_norm", 1e-5) for image in features]


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 6), min_size=2, max_size=4),
    queries=st.integers(1, 4),
    places=st.integers(1, 5),
    layers=st.integers(1, 3),
    frequency=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_losses_and_gradients_are_those_of_the_equations(
    lengths: list[int], queries: int, places: int, layers: int, frequency: int, seed: int
) -> None:
    case = make_case(
        lengths, seed=seed, queries=queries, places=places, layers=layers, frequency=frequency
    )
    bridge = case.bridge
    fast = alignment_losses(
        bridge,
        bridge.read_image(case.features),
        case.text,
        LossSettings(DECODE_START),
        negatives=case.negatives,
    )
    naive, heads = naive_of(bridge)
    slow = naive_losses(
        naive,
        heads,
        normed_images(bridge, case.features),
        list(zip(case.text.ids, case.text.mask, strict=True)),
        negatives=(
            case.negatives.image_for_text.tolist(),
            case.negatives.text_for_image.tolist(),
        ),
        decode_start=DECODE_START,
        smoothing=0.1,
    )
    torch.testing.assert_close(fast.similar.image_to_text, slow.image_to_text)
    torch.testing.assert_close(fast.similar.text_to_image, slow.text_to_image)
    for name in ("contrast", "match", "caption"):
        # The fast losses end in float32 by design.
        expected = getattr(slow, name)
        torch.testing.assert_close(fast.parts[name].double(), expected, rtol=1e-5, atol=1e-5)
    trained = {
        name: item for name, item in bridge.named_parameters() if not name.startswith("projection")
    }
    ours, theirs = (
        torch.autograd.grad(total, list(trained.values()), allow_unused=True)
        for total in (fast.total, slow.total)
    )
    for name, found, expected in zip(trained, ours, theirs, strict=True):
        zero = torch.zeros_like(trained[name])
        torch.testing.assert_close(
            zero if found is None else found,
            zero if expected is None else expected,
            rtol=1e-4,
            atol=1e-5,
            msg=lambda text, name=name: f"gradient of {name}: {text}",
        )


@settings(max_examples=6, deadline=None)
@given(lengths=st.lists(st.integers(2, 6), min_size=2, max_size=3), seed=st.integers(0, 99))
def test_the_instruction_aware_prefix_is_the_query_rows_of_the_pair_pass(
    lengths: list[int], seed: int
) -> None:
    case = make_case(lengths, seed=seed)
    bridge = case.bridge
    fast = bridge.visual_prefix(bridge.read_image(case.features), case.text.ids, case.text.mask)
    naive, _ = naive_of(bridge)
    assert bridge.projection is not None
    for row, image in enumerate(normed_images(bridge, case.features)):
        hidden = naive.pair(image, case.text.ids[row], case.text.mask[row])[: naive.num_queries]
        expected = hidden @ bridge.projection.weight.T + bridge.projection.bias
        torch.testing.assert_close(fast[row], expected)


def test_negatives_are_weighted_by_similarity_and_never_the_own_pair() -> None:
    case = make_case([3, 4, 5, 6], seed=1)
    similar = alignment_losses(
        case.bridge,
        case.bridge.read_image(case.features),
        case.text,
        LossSettings(DECODE_START, ("contrast",)),
    ).similar
    weights = negative_weights(similar)
    for found, matrix in zip(weights, (similar.text_to_image, similar.image_to_text), strict=True):
        for row in range(4):
            others = [column for column in range(4) if column != row]
            expected = torch.exp(matrix[row, others])
            expected = expected / expected.sum()
            torch.testing.assert_close(
                found[row, others], expected.detach().float(), rtol=1e-5, atol=1e-6
            )
            assert found[row, row] == 0
    torch.manual_seed(0)
    counts = torch.zeros(4, 4)
    for _ in range(4000):
        counts[torch.arange(4), sample_negatives(similar).image_for_text] += 1
    torch.testing.assert_close(counts / 4000, weights[0], atol=0.03, rtol=0)


def test_gathered_vectors_without_gradient_change_gradients_but_not_values() -> None:
    case = make_case([3, 5], seed=2)
    found = [
        alignment_losses(
            case.bridge,
            case.bridge.read_image(case.features),
            case.text,
            LossSettings(DECODE_START, ("contrast",), detach_gathered=detached),
        ).total
        for detached in (False, True)
    ]
    assert found[0] == found[1]
    weight = case.bridge.alignment.vision_projection.weight
    gradients = [torch.autograd.grad(total, weight)[0] for total in found]
    assert not torch.allclose(*gradients)
