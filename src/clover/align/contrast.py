"""Image-text contrast, ITC (SPEC, section 2.1).

An image is as similar to a text as its best query is. Axes: B batch here, N batch over all ranks,
Q queries, C contrastive width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Similarity:
    """Similarities divided by the temperature, each [B, N]."""

    image_to_text: Tensor
    text_to_image: Tensor

    def detach(self) -> Similarity:
        """Return the numbers without their graph."""
        return Similarity(self.image_to_text.detach(), self.text_to_image.detach())


def similarity(
    image: Tensor,
    text: Tensor,
    temperature: Tensor,
    *,
    all_image: Tensor | None = None,
    all_text: Tensor | None = None,
) -> Similarity:
    """Compare every image with every text: the largest over queries of the dot product.

    Args:
        image: Unit vectors [B, Q, C] of this rank.
        text: Unit vectors [B, C] of this rank.
        temperature: Scalar.
        all_image: [N, Q, C] gathered over ranks; this rank's own when absent.
        all_text: [N, C] likewise. The reference gathers without gradient.
    """
    all_image = image if all_image is None else all_image
    all_text = text if all_text is None else all_text
    image_to_text = torch.einsum("bqc,nc->bnq", image, all_text).amax(dim=-1)
    text_to_image = torch.einsum("bc,nqc->bnq", text, all_image).amax(dim=-1)
    return Similarity(image_to_text / temperature, text_to_image / temperature)


def same_caption(ids: Tensor, mask: Tensor, *, offset: int = 0, size: int | None = None) -> Tensor:
    """Return which other texts [B, N] say the same as a row's own: no negatives of its image.

    Args:
        ids: Word pieces [N, T] of all ranks' texts.
        mask: [N, T], 1 = a token.
        offset: This rank's first row among them (rank * B).
        size: B; all N when absent.
    """
    words = ids.masked_fill(mask == 0, -1)
    own = words[offset : offset + (len(words) if size is None else size)]
    same = (own[:, None] == words[None]).all(dim=2)
    rows = torch.arange(len(own), device=ids.device)
    return same.scatter_(1, (rows + offset)[:, None], False)


def contrastive_loss(
    similar: Similarity,
    *,
    label_smoothing: float,
    offset: int = 0,
    ignored: Tensor | None = None,
) -> Tensor:
    """Cross-entropy both ways, averaged; the own pair is the target.

    Args:
        similar: From `similarity`.
        label_smoothing: 0.1 as published.
        offset: This rank's first row among all (rank * B).
        ignored: Pairs [B, N] that are no negatives (`same_caption`): as if they were not there.
    """
    if ignored is not None:
        both = (similar.image_to_text, similar.text_to_image)
        losses = [_masked_loss(item.float(), ignored, offset, label_smoothing) for item in both]
        return (losses[0] + losses[1]) / 2
    batch = similar.image_to_text.shape[0]
    target = torch.arange(offset, offset + batch, device=similar.image_to_text.device)
    loss = F.cross_entropy(
        similar.image_to_text.float(), target, label_smoothing=label_smoothing
    ) + F.cross_entropy(similar.text_to_image.float(), target, label_smoothing=label_smoothing)
    return loss / 2


def _masked_loss(logits: Tensor, ignored: Tensor, offset: int, smoothing: float) -> Tensor:
    """Cross-entropy over the columns that are left, smoothed over these alone."""
    rows = torch.arange(len(logits), device=logits.device)
    scores = logits.masked_fill(ignored, -torch.inf).log_softmax(dim=1)
    spread = scores.masked_fill(ignored, 0).sum(dim=1) / (~ignored).sum(dim=1)
    return -((1 - smoothing) * scores[rows, rows + offset] + smoothing * spread).mean()
