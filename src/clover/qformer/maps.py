"""Where the queries look: cross-attention over the image, layer by layer, as means and as rollout.

In: a bridge, an image's keys, a question's word pieces. Out: maps over image tokens. These say what
the Q-Former read from; whether an answer depends on it is another question, which only deleting the
place answers.

Axes: L layers with cross-attention, Q queries, T text tokens, P image tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clover.qformer.attention import Attention, KeyValue
from clover.qformer.bridge import Bridge
from clover.qformer.model import ImageKeys


@dataclass(frozen=True)
class AttentionMaps:
    """What each query reads of one image; every map sums to 1 over its places."""

    layers: Tensor
    """`[L, Q, G, G]`: the mean over heads, for each layer that looks at the image."""
    rollout: Tensor
    """`[Q, G, G]`: attention followed through all layers."""

    @property
    def mean(self) -> Tensor:
        """The mean over layers `[Q, G, G]`."""
        return self.layers.mean(dim=0)


@torch.no_grad()
def attention_maps(
    bridge: Bridge, image: ImageKeys, ids: Tensor | None = None, mask: Tensor | None = None
) -> AttentionMaps:
    """Return where the queries look in one image.

    Rollout follows each row through the layers: it keeps half of what it had (the residual) and
    takes half from the rows it attends to; cross-attention adds the image's places in the same way.

    Args:
        bridge: The bridge.
        image: Keys of one image.
        ids: The question's word pieces `[1, T]`; none for a Q-Former that does not read it.
        mask: `[1, T]`.

    Source: Abnar and Zuidema 2020, section 3, carried over to cross-attention.
    """
    heard: list[tuple[str, Tensor]] = []
    with _listening(bridge, heard):
        bridge.visual_hidden(image, ids, mask)
    crossed = [weights for kind, weights in heard if kind == "cross"]
    places, queries = crossed[0].shape[-1], crossed[0].shape[0]
    reach = crossed[0].new_zeros(_num_rows(heard), places)  # [Q + T, P]
    for kind, weights in heard:
        rows = weights.shape[0]
        if kind == "self":
            # The last layer computes the queries alone.
            reach = 0.5 * reach[:rows] + 0.5 * weights @ reach
        else:
            read = 0.5 * reach[:queries] + 0.5 * weights
            reach = torch.cat([read, reach[queries:]])
    rollout = reach[:queries] / reach[:queries].sum(dim=-1, keepdim=True)
    return AttentionMaps(_square(torch.stack(crossed)), _square(rollout))


@contextlib.contextmanager
def _listening(bridge: Bridge, heard: list[tuple[str, Tensor]]) -> Iterator[None]:
    """Note the attention weights of every layer while the context lasts, heads averaged."""

    def note(kind: str) -> Any:
        def hook(module: Attention, arguments: tuple[Tensor, KeyValue, Tensor | None]) -> None:
            x, keys, mask = arguments
            heard.append((kind, module.weights(x, keys, mask)[0].mean(dim=0)))

        return hook

    hooks = []
    for layer in bridge.qformer.layers:
        hooks.append(layer.attention.register_forward_pre_hook(note("self")))  # type: ignore[union-attr]
        if layer.cross_attention is not None:
            hooks.append(layer.cross_attention.register_forward_pre_hook(note("cross")))  # type: ignore[union-attr]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _num_rows(heard: list[tuple[str, Tensor]]) -> int:
    return next(weights.shape[-1] for kind, weights in heard if kind == "self")


def _square(maps: Tensor) -> Tensor:
    """`[..., P]` -> `[..., G, G]`, each summing to 1; a class token before them is left out."""
    places = maps.shape[-1]
    side = int(places**0.5)
    if side * side != places:
        assert (side * side) == places - 1, "image tokens are a square, or a square and one more"
        maps = maps[..., 1:]
        maps = (maps / maps.sum(dim=-1, keepdim=True)).contiguous()
    return maps.view(*maps.shape[:-1], side, side)
