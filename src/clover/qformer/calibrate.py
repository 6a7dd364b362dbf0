"""Start fresh weights at the data's own scale, so that a short training learns from step 1.

Fresh cross-attention adds to each query a vector that is almost the same for every image: the
contrast then stays at log(batch) for hundreds of steps. Here one forward pass over a sample sets
what would take those steps: image channels are centred and scaled by the trainable LayerNorm that
is there anyway, cross-attention updates get unit variance between images, and the projections
subtract the mean they see. Only fresh weights are touched; the architecture is the published one.

# Paper: draws N(0, 0.02) and trains for days; here calibrated, see docs/decisions/0005.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clover.qformer.bridge import Bridge
from clover.qformer.model import Layer
from clover.qformer.tokenizer import Tokens

_LEAST = 1e-3  # a channel that never varies is left as it is


@torch.no_grad()
def calibrate_image(bridge: Bridge, features: Tensor) -> None:
    """Centre and scale image channels and cross-attention by a sample of images.

    Args:
        bridge: Freshly built.
        features: [N, P, E], N at least 2.
    """
    norm = bridge.vision_norm
    tokens = F.layer_norm(features.float(), (features.shape[-1],)).flatten(0, 1)
    std, mean = torch.std_mean(tokens, dim=0)
    std = std.clamp_min(_LEAST)
    norm.weight.copy_(1 / std)
    norm.bias.copy_(-mean / std)
    handles = [
        layer.cross_attention.output.register_forward_hook(_unit_variance)
        for layer in bridge.qformer.layers
        if isinstance(layer, Layer) and layer.cross_attention is not None
    ]
    try:
        bridge.qformer.encode_queries(bridge.read_image(features))
    finally:
        for handle in handles:
            handle.remove()


def _unit_variance(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Any:
    """Rescale a linear layer so that its output varies by 1 between images, around 0."""
    assert isinstance(module, nn.Linear)
    spread = output.std(dim=0).mean().clamp_min(_LEAST)  # between images, over queries and width
    module.weight.div_(spread)
    module.bias.copy_((module.bias - output.mean(dim=(0, 1))) / spread)
    return F.linear(inputs[0], module.weight, module.bias)


@torch.no_grad()
def calibrate_alignment(bridge: Bridge, features: Tensor, text: Tokens) -> None:
    """Let the contrastive projections subtract the mean of what they will see.

    Args:
        bridge: After `calibrate_image`.
        features: [N, P, E].
        text: The N captions.
    """
    heads, qformer = bridge.alignment, bridge.qformer
    image_rows = qformer.encode_queries(bridge.read_image(features)).hidden
    text_rows = qformer.encode_text(text.ids, text.mask, first_row=True)
    for projection, rows in (
        (heads.vision_projection, image_rows),
        (heads.text_projection, text_rows),
    ):
        projection.bias.copy_(-F.linear(rows.flatten(0, 1).mean(dim=0), projection.weight))


@torch.no_grad()
def calibrate_projection(bridge: Bridge, prefix: Tensor, *, mean: Tensor, std: float) -> None:
    """Let visual tokens start among the language model's words: their mean, their spread.

    Args:
        bridge: With a projection.
        prefix: What the projection gives for a sample of images [N, Q, H].
        mean: Of the language model's word embeddings [H].
        std: Of the language model's word embeddings.
    """
    projection = bridge.projection
    assert projection is not None, "this bridge was built without a language model"
    rows = prefix.flatten(0, 1)
    scale = std / rows.std(dim=0).mean().clamp_min(_LEAST)
    projection.weight.mul_(scale)
    projection.bias.copy_(mean + scale * (projection.bias - rows.mean(dim=0)))
