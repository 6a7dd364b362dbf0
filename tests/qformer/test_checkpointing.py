"""Layers computed again on the way back: the same numbers, fewer of them kept."""

from __future__ import annotations

import torch
from torch import Tensor

from clover.align.losses import LossSettings, alignment_losses
from clover.core.config import QFormerConfig
from clover.qformer.bridge import Bridge
from clover.qformer.tokenizer import Tokens

CONFIG = QFormerConfig(
    hidden_size=32,
    num_layers=4,
    num_heads=4,
    intermediate_size=96,
    vocab_size=60,
    max_positions=24,
    encoder_width=16,
    num_queries=6,
    embedding_size=8,
    dropout=0.2,
)


def step(*, is_checkpointed: bool) -> tuple[dict[str, Tensor], Tensor, int]:
    """Return a step's gradients, the random state behind it, and the bytes kept for it."""
    torch.manual_seed(0)
    config = CONFIG.model_copy(update={"checkpoint_activations": is_checkpointed})
    bridge = Bridge(config, language_width=8, has_alignment=True).train()
    features = torch.randn(6, 20, 16)
    ids = torch.randint(1, 59, (6, 16))
    text = Tokens(ids, torch.ones_like(ids))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        image = bridge.read_image(features)
        losses = alignment_losses(bridge, image, text, LossSettings(59))
        prefix = bridge.visual_prefix(image, text.ids, text.mask)
        total = losses.total + prefix.square().sum()
    total.backward()  # type: ignore[no-untyped-call]
    gradients = {
        name: item.grad for name, item in bridge.named_parameters() if item.grad is not None
    }
    return gradients, torch.get_rng_state(), sum(kept.values())


def test_gradients_are_the_same_bits_also_with_dropout_and_most_of_the_inside_is_not_kept() -> None:
    plain, state, much = step(is_checkpointed=False)
    again, after, little = step(is_checkpointed=True)
    assert plain.keys() == again.keys() and len(plain) > 50
    for name, value in plain.items():
        assert torch.equal(again[name], value), name
    assert torch.equal(state, after)
    assert little < 0.6 * much
