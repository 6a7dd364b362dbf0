"""The Q-Former with torch's own operations, as a peer computes it: no operation of ours is left
but a copy of the image keys, head by head.

An encoder of ours too: its products are then those that torch itself chooses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from torch import Tensor, nn
from torch.nn import functional as F

from clover.core import linear
from clover.qformer import attention, model


def add_dropped(x: Tensor, update: Tensor, probability: float) -> Tensor:
    """`clover.core.dropout.add_dropped`."""
    return x + F.dropout(update, probability)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, dropout: float = 0.0
) -> Tensor:
    """`clover.core.attend.attend`."""
    read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return read.transpose(1, 2).flatten(2)


def project_images(features: Tensor, norm: nn.LayerNorm, layers: list[nn.Linear]) -> list[Tensor]:
    """`clover.qformer.image_projection.project_images`."""
    x = norm(features)
    return [layer(x) for layer in layers]


@contextlib.contextmanager
def torch_operations() -> Iterator[None]:
    """Within the block, let the Q-Former compute with torch's operations alone."""
    with (
        mock.patch.object(attention, "add_dropped", add_dropped),
        mock.patch.object(attention, "attend", attend),
        mock.patch.object(attention, "as_multiplied", lambda x: x),
        mock.patch.object(model, "project_images", project_images),
        mock.patch.object(linear, "is_onednn_faster", lambda: False),
    ):
        yield
