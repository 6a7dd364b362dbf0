"""The three losses of stage 1 over one batch, computed with as few passes as they allow.

Image keys are projected once and shared by the image pass and the matching pass; the caption pass
reuses the image pass's self-attention cache (SPEC, sections 1.5 and 2).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from clover.align.caption import caption_inputs, caption_loss
from clover.align.contrast import Similarity, contrastive_loss, same_caption, similarity
from clover.align.match import Negatives, matching_loss, sample_negatives
from clover.qformer.bridge import Bridge
from clover.qformer.model import ImageKeys
from clover.qformer.tokenizer import Tokens

ALL_LOSSES = ("contrast", "match", "caption")


@dataclass(frozen=True)
class AlignmentLosses:
    """Each loss by name (a scalar), and the similarities they came from."""

    parts: dict[str, Tensor]
    similar: Similarity

    @property
    def total(self) -> Tensor:
        """Their sum, with equal weights (SPEC, section 2.4)."""
        return torch.stack(list(self.parts.values())).sum()


def alignment_losses(
    bridge: Bridge,
    image: ImageKeys,
    text: Tokens,
    *,
    decode_start: int,
    which: Collection[str] = ALL_LOSSES,
    label_smoothing: float = 0.1,
    negatives: Negatives | None = None,
    detach_gathered: bool = False,
    ignore_duplicates: bool = False,
) -> AlignmentLosses:
    """Compute the losses of one batch of B images and their texts.

    Args:
        bridge: With alignment heads.
        image: Keys of the B images.
        text: Their captions.
        decode_start: Id of `[DEC]`.
        which: Names of the losses wanted.
        label_smoothing: Of the contrast and the caption.
        negatives: Given ones, for tests; drawn by similarity otherwise.
        detach_gathered: As the reference does once a process group exists: the other side's
            vectors carry no gradient (SPEC, section 2.1).
        ignore_duplicates: Whether a text that says the same as an image's own is no negative of it.
    """
    heads = bridge.alignment
    image_pass = bridge.qformer.encode_queries(image)
    text_rows = bridge.qformer.encode_text(text.ids, text.mask, first_row=True)
    image_vectors = heads.embed_image(image_pass.hidden)
    text_vectors = heads.embed_text(text_rows[:, 0])
    similar = similarity(
        image_vectors,
        text_vectors,
        heads.temperature,
        all_image=image_vectors.detach() if detach_gathered else None,
        all_text=text_vectors.detach() if detach_gathered else None,
    )
    parts: dict[str, Tensor] = {}
    ignored = same_caption(text.ids, text.mask) if ignore_duplicates else None
    if "contrast" in which:
        parts["contrast"] = contrastive_loss(
            similar, label_smoothing=label_smoothing, ignored=ignored
        )
    if "match" in which:
        if negatives is None:
            negatives = sample_negatives(similar, ignored=ignored)
        parts["match"] = matching_loss(match_logits(bridge, image, text, negatives))
    if "caption" in which:
        inputs = caption_inputs(text.ids, decode_start=decode_start)
        hidden = bridge.qformer.decode_text(inputs, text.mask, image_pass.cache)
        parts["caption"] = caption_loss(
            hidden,
            inputs,
            text.mask,
            heads=heads,
            word_embedding=bridge.qformer.word_embedding.weight,
            label_smoothing=label_smoothing,
        )
    return AlignmentLosses(parts, similar)


def match_logits(bridge: Bridge, image: ImageKeys, text: Tokens, negatives: Negatives) -> Tensor:
    """Return matching logits [3B, 2] of (own, own), (negative image, own), (own, negative text)."""
    own = torch.arange(len(text.ids), device=text.ids.device)
    # An image's two texts stand together and ask the same keys; only other images' are copied.
    texts = torch.stack([own, negatives.text_for_image], dim=1).flatten()
    same = bridge.qformer.encode_pair(image, text.ids[texts], text.mask[texts], queries_only=True)
    other = bridge.qformer.encode_pair(
        image.select(negatives.image_for_text), text.ids, text.mask, queries_only=True
    )
    return bridge.alignment.match(torch.cat([same[0::2], other, same[1::2]]))
