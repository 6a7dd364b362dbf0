"""Where the queries looked: the cross-attention of one image pass, as maps over the image.

In: a bridge, one image's tokens, and the question's word pieces. Out: a weight for each layer,
query and image token, their mean, and the rollout through both layers' self-attention.

A map says where the queries read; whether the answer hangs on it is another question, which
`clover.explain` puts to the model.

Axes: L layers with cross-attention, H heads, Q queries, T text tokens, P image tokens, G = grid
side, G x G = P.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from clover.core.errors import CloverError
from clover.qformer.attention import Attention, KeyValue
from clover.qformer.bridge import Bridge
from clover.qformer.model import Layer


@dataclass(frozen=True)
class AttentionMap:
    """Cross-attention of one image, averaged over heads; every map sums to 1 over the grid.

    Attributes:
        weights: [L, Q, G, G], row 0 is the top of the image.
        rolled: Rollout [Q, G, G].
    """

    weights: Tensor
    rolled: Tensor

    @property
    def grid(self) -> int:
        """Image tokens along a side, G."""
        return self.weights.shape[-1]

    def layer(self, index: int) -> Tensor:
        """Return one layer's mean over queries [G, G]; -1 is the last layer."""
        return self.weights[index].mean(dim=0)

    def mean(self) -> Tensor:
        """Return the mean over layers and queries [G, G]."""
        return self.weights.mean(dim=(0, 1))

    def rollout(self) -> Tensor:
        """Return the rollout, averaged over queries [G, G]."""
        return self.rolled.mean(dim=0)


@torch.no_grad()
def attention_map(
    bridge: Bridge,
    features: Tensor,
    ids: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    places: Tensor | None = None,
) -> AttentionMap:
    """Return where the queries look in one image.

    Args:
        bridge: In evaluation mode.
        features: The image's tokens as the encoder gave them [1, P, E].
        ids: The question's word pieces [1, T]; None for a Q-Former that does not read it.
        mask: [1, T], 1 = a token.
        places: Which tokens show each place, [copies, G * G], of an image that is read in several
            copies; a place's weight is that of its tokens together.

    Raises:
        CloverError: the encoder's tokens form no square grid.
    """
    if places is None:
        side = grid_side(features.shape[1])
        # A class token stands before the grid, and is no place in the image.
        places = torch.arange(-side * side, 0)[None] + features.shape[1]
    side = math.isqrt(places.shape[1])
    with _recorded(bridge) as passes:
        bridge.visual_hidden(bridge.read_image(features), ids, mask)
    num_queries = bridge.config.num_queries
    cross = torch.stack([item.cross for item in passes if item.cross is not None])  # [L, Q, P]
    rolled = _rollout(passes, num_queries, features.shape[1])
    return AttentionMap(
        _shares(cross[..., places].sum(dim=-2)).view(-1, num_queries, side, side),
        _shares(rolled[..., places].sum(dim=-2)).view(num_queries, side, side),
    )


def grid_side(num_tokens: int) -> int:
    """Return the side G of the square that P image tokens form, a class token apart.

    Raises:
        CloverError: they form none.
    """
    for count in (num_tokens, num_tokens - 1):
        side = math.isqrt(max(count, 0))
        if side and side * side == count:
            return side
    raise CloverError(f"{num_tokens} image tokens form no square grid; no map can be drawn of them")


def _shares(weights: Tensor) -> Tensor:
    """Divide [..., P] so that each row sums to 1."""
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-12)


@dataclass
class _LayerPass:
    """What one layer did: self-attention [R, R] and, where it has one, cross-attention [Q, P]."""

    own: Tensor
    cross: Tensor | None = None


@contextmanager
def _recorded(bridge: Bridge) -> Iterator[list[_LayerPass]]:
    """Yield a list that fills with each layer's attention while the block runs.

    The fast kernel keeps no weights; they are computed again from what it was given.
    """
    passes: list[_LayerPass] = []

    def note_own(module: Attention, given: tuple[Tensor, KeyValue, Tensor | None]) -> None:
        passes.append(_LayerPass(weights_of(module, *given)))

    def note_cross(module: Attention, given: tuple[Tensor, KeyValue, Tensor | None]) -> None:
        passes[-1].cross = weights_of(module, *given)

    handles = []
    try:
        for layer in bridge.qformer.layers:
            assert isinstance(layer, Layer)
            handles.append(layer.attention.register_forward_pre_hook(note_own))
            if layer.cross_attention is not None:
                handles.append(layer.cross_attention.register_forward_pre_hook(note_cross))
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def weights_of(module: Attention, x: Tensor, keys: KeyValue, mask: Tensor | None) -> Tensor:
    """Return the attention of one image's rows, averaged over heads [R, K], float32.

    Args:
        module: The attention.
        x: Rows that ask [1, R, D].
        keys: As `Attention.forward` takes them, [1, H, K, D/H] each.
        mask: True = may look.
    """
    asked = module.split(module.query(x)).float()
    scores = asked @ keys[0].float().transpose(-1, -2) / math.sqrt(asked.shape[-1])  # [1, H, R, K]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1).mean(dim=1)[0]


def _rollout(passes: list[_LayerPass], num_queries: int, num_tokens: int) -> Tensor:
    """Follow image tokens through the layers to the last query rows [Q, P].

    Each attention is averaged with the identity, which stands for the residual; text rows carry
    what they took from the queries a layer before.

    Source: Abnar and Zuidema 2020, section 3, extended to cross-attention.
    """
    rows = passes[0].own.shape[1]
    relevance = passes[0].own.new_zeros(rows, num_tokens)
    for item in passes:
        kept = item.own.shape[0]  # the last layer computes the query rows alone
        relevance = (item.own @ relevance + relevance[:kept]) / 2
        if item.cross is not None:
            queries = (relevance[:num_queries] + item.cross) / 2
            relevance = torch.cat([queries, relevance[num_queries:]])
    return relevance[:num_queries]
