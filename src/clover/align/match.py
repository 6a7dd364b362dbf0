"""Image-text matching, ITM, with hard negatives from the contrast (SPEC, section 2.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from clover.align.contrast import Similarity
from clover.core.errors import CloverError

_OWN = -10000.0  # the reference's value: softmax makes it exactly zero in float32


@dataclass(frozen=True)
class Negatives:
    """For text b the image `image_for_text[b]`, for image b the text `text_for_image[b]`."""

    image_for_text: Tensor
    text_for_image: Tensor


def negative_weights(
    similar: Similarity, *, offset: int = 0, ignored: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the sampling weights (text to image, image to text), each [B, N], own pair zero.

    Pairs of `ignored` [B, N] have zero weight too, save where a row would have no negative left. A
    row of similarities that are not finite has equal weights: from it anything may be drawn, since
    the loss is not finite either, and the loop says so with the batch's names.
    """
    batch = similar.image_to_text.shape[0]
    rows = torch.arange(batch, device=similar.image_to_text.device)
    weights = []
    for matrix in (similar.text_to_image, similar.image_to_text):
        masked = matrix.detach().float().clone()
        if ignored is not None:
            is_alone = ignored.sum(dim=1, keepdim=True) == ignored.shape[1] - 1
            masked.masked_fill_(ignored & ~is_alone, _OWN)
        # Not `masked[rows, rows + offset] = _OWN`, which copies the number to a GPU and waits.
        masked.scatter_(1, (rows + offset)[:, None], _OWN)
        weights.append(masked.softmax(dim=1).nan_to_num(nan=1.0))
    return weights[0], weights[1]


def sample_negatives(
    similar: Similarity, *, offset: int = 0, ignored: Tensor | None = None
) -> Negatives:
    """Draw one negative image a text, then one negative text an image, by similarity.

    Raises:
        CloverError: a batch of one pair, which has no negative.
    """
    if similar.image_to_text.shape[1] < 2:
        raise CloverError(
            "the matching loss needs a negative: align.batch_size is 1, the least is 2"
        )
    text_to_image, image_to_text = negative_weights(similar, offset=offset, ignored=ignored)
    return Negatives(_draw(text_to_image), _draw(image_to_text))


def _draw(weights: Tensor) -> Tensor:
    """Return one column of each row [B, N] by its weight [B].

    What `torch.multinomial` draws, number for number; it waits for a GPU to say that the weights
    are ones that can be drawn by.
    """
    return (weights / torch.empty_like(weights).exponential_()).argmax(dim=1)


def matching_loss(logits: Tensor) -> Tensor:
    """Cross-entropy over logits [3B, 2]: B matching pairs first, then 2B that do not match."""
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    labels[: len(logits) // 3] = 1
    return F.cross_entropy(logits.float(), labels)


def matching_share(logits: Tensor, is_match: Tensor, *, pairs: int) -> Tensor:
    """Return what some pairs [n, 2] add to the mean over all `pairs`; `is_match` [n] says which."""
    return F.cross_entropy(logits.float(), is_match.long(), reduction="sum") / pairs
