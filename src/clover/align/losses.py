"""The three losses of stage 1 over one batch, computed with as few passes as they allow.

Image keys are projected once and shared by the image pass and the matching pass; the caption pass
reuses the image pass's self-attention cache (SPEC, sections 1.5 and 2).

Where several processes train, each has B pairs of the batch of N, and every image is compared with
all N texts and every text with all N images: loss and gradient of the one batch of N.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from clover.align.caption import caption_inputs, caption_loss
from clover.align.contrast import Similarity, contrastive_loss, same_caption, similarity
from clover.align.match import Negatives, matching_loss, sample_negatives
from clover.qformer.bridge import Bridge
from clover.qformer.model import ImageKeys, QueryPass
from clover.qformer.tokenizer import Tokens
from clover.training import processes

ALL_LOSSES = ("contrast", "match", "caption")
_FEW = 64
"""Pairs of a batch on a GPU whose matching is one part: a step of 36 of the published size takes
6.4 GiB so, and 6.0 in two parts (docs/benchmarks.md)."""


@dataclass(frozen=True)
class LossSettings:
    """What the losses of a batch are told beside the batch."""

    decode_start: int
    """Id of `[DEC]`."""
    which: Collection[str] = ALL_LOSSES
    """Names of the losses wanted."""
    label_smoothing: float = 0.1
    """Of the contrast and the caption."""
    detach_gathered: bool = False
    """As the reference does: the gathered vectors are detached copies, this process's own among
    them (SPEC, section 2.1). Otherwise they carry gradient, to whichever process they came from."""
    ignore_duplicates: bool = False
    """Whether a text that says the same as an image's own is no negative of it."""

    def words(self, text: Tokens) -> Tensor:
        """Return all word ids [B, T + 1] that the passes over these texts read."""
        return F.pad(text.ids, (0, 1), value=self.decode_start)


@dataclass(frozen=True)
class AlignmentLosses:
    """Each loss by name (a scalar), and the similarities they came from."""

    parts: dict[str, Tensor]
    similar: Similarity

    @property
    def total(self) -> Tensor:
        """Their sum, with equal weights (SPEC, section 2.4)."""
        return torch.stack(list(self.parts.values())).sum()


@dataclass(frozen=True)
class Everyone:
    """The pairs of all processes, in the order of ranks: where negatives come from."""

    features: Tensor
    """Image tokens [N, P, E] as the encoder gave them."""
    text: Tokens
    """Their captions [N, T]."""
    offset: int
    """This process's first row (rank * B)."""

    @classmethod
    def gather(cls, features: Tensor, text: Tokens) -> Everyone:
        """Gather every process's image tokens [B, P, E] and captions [B, T] to those of all."""
        width = int(processes.gather_rows(_number(text.ids.shape[1])).max())
        padded = (0, width - text.ids.shape[1])
        ids = processes.gather_rows(F.pad(text.ids, padded))
        mask = processes.gather_rows(F.pad(text.mask, padded))
        offset = processes.rank() * len(text.ids)
        return cls(processes.gather_rows(features), Tokens(ids, mask), offset)


def _number(value: int) -> Tensor:
    return torch.tensor([value])


def alignment_losses(
    bridge: Bridge,
    image: ImageKeys,
    text: Tokens,
    settings: LossSettings,
    *,
    everyone: Everyone | None = None,
    negatives: Negatives | None = None,
) -> AlignmentLosses:
    """Compute the losses of one batch of B images and their texts.

    Args:
        bridge: With alignment heads.
        image: Keys of the B images.
        text: Their captions.
        settings: Which losses, and how.
        everyone: The pairs of all processes, where there are several.
        negatives: Given ones (rows among all N), for tests; drawn by similarity otherwise.
    """
    compared = compare(bridge, image, text, settings, everyone)
    parts: dict[str, Tensor] = {}
    if "contrast" in settings.which:
        parts["contrast"] = compared.contrast()
    if "match" in settings.which:
        if negatives is None:
            negatives = compared.negatives()
        parts["match"] = matching_loss(match_logits(bridge, image, text, negatives, everyone))
    if "caption" in settings.which:
        parts["caption"] = compared.caption(bridge, text)
    return AlignmentLosses(parts, compared.similar)


@dataclass(frozen=True)
class Compared:
    """What the losses of a batch of B pairs start from.

    Attributes:
        image_pass: The queries' pass over the images, whose cache the caption reads.
        similar: Similarities with the N pairs of all processes.
        offset: This process's first row among them.
        ignored: Pairs that are no negatives of each other [B, N]; None for none.
        settings: How the losses are taken.
    """

    image_pass: QueryPass
    similar: Similarity
    offset: int
    ignored: Tensor | None
    settings: LossSettings

    def contrast(self) -> Tensor:
        """Return the contrastive loss."""
        return contrastive_loss(
            self.similar,
            label_smoothing=self.settings.label_smoothing,
            offset=self.offset,
            ignored=self.ignored,
        )

    def negatives(self) -> Negatives:
        """Draw hard negatives by similarity."""
        return sample_negatives(self.similar, offset=self.offset, ignored=self.ignored)

    def caption(self, bridge: Bridge, text: Tokens) -> Tensor:
        """Return the captioning loss."""
        return captioning_loss(bridge, text, self.image_pass, self.settings)


def captioning_loss(
    bridge: Bridge, text: Tokens, image_pass: QueryPass, settings: LossSettings
) -> Tensor:
    """Return the loss of writing each image's text behind the cache of its queries' pass."""
    inputs = caption_inputs(text.ids, decode_start=settings.decode_start)
    return caption_loss(
        bridge.qformer.decode_text(inputs, text.mask, image_pass.cache),
        inputs,
        text.mask,
        heads=bridge.alignment,
        word_embedding=bridge.qformer.word_embedding.weight,
        label_smoothing=settings.label_smoothing,
    )


def compare(
    bridge: Bridge,
    image: ImageKeys,
    text: Tokens,
    settings: LossSettings,
    everyone: Everyone | None,
) -> Compared:
    """Run the passes that see image and text apart, and compare what they give."""
    heads, is_detached = bridge.alignment, settings.detach_gathered
    image_pass = bridge.qformer.encode_queries(image)
    text_rows = bridge.qformer.encode_text(text.ids, text.mask, first_row=True)
    image_vectors = heads.embed_image(image_pass.hidden)
    text_vectors = heads.embed_text(text_rows[:, 0])
    similar = similarity(
        image_vectors,
        text_vectors,
        heads.temperature,
        all_image=_gathered(image_vectors, is_detached),
        all_text=_gathered(text_vectors, is_detached),
    )
    texts, offset = (text, 0) if everyone is None else (everyone.text, everyone.offset)
    ignored = None
    if settings.ignore_duplicates:
        ignored = same_caption(texts.ids, texts.mask, offset=offset, size=len(text.ids))
    return Compared(image_pass, similar, offset, ignored, settings)


def _gathered(vectors: Tensor, is_detached: bool) -> Tensor:
    """Return the vectors of all processes [N, ...] that this one's [B, ...] are compared with."""
    if is_detached:
        return processes.gather_rows(vectors.detach())
    return processes.gather_rows(vectors, with_gradient=True)


def match_logits(
    bridge: Bridge,
    image: ImageKeys,
    text: Tokens,
    negatives: Negatives,
    everyone: Everyone | None = None,
) -> Tensor:
    """Return matching logits [3B, 2] of (own, own), (negative image, own), (own, negative text)."""
    parts = matching_parts(bridge, image, text, negatives, everyone)
    return torch.cat([pair_logits(bridge, part) for part in parts])


def matching_parts(
    bridge: Bridge,
    image: ImageKeys,
    text: Tokens,
    negatives: Negatives,
    everyone: Everyone | None = None,
) -> Iterator[MatchingPart]:
    """Yield the own pairs, those with a negative image in two halves, those with a negative text.

    A negative image's keys are copies, and so are their gradients: they come by halves. Where
    `everyone` is given, a negative image comes as the encoder's tokens and is projected here: at
    the published size its keys have six times the bytes, and gradients that would be sent back.
    """
    yield MatchingPart(image, text, _all_match(text.ids, is_match=True))
    ids, masks = text.ids.chunk(2), text.mask.chunk(2)
    for chosen, *own in zip(negatives.image_for_text.chunk(2), ids, masks, strict=True):
        # Without a name here: a generator would hold it while the next part is read.
        yield MatchingPart(
            image.select(chosen)
            if everyone is None
            else bridge.read_image(everyone.features[chosen]),
            Tokens(*own),
            _all_match(own[0], is_match=False),
        )
    texts, rows = text if everyone is None else everyone.text, negatives.text_for_image
    others = Tokens(texts.ids[rows], texts.mask[rows])
    yield MatchingPart(image, others, _all_match(others.ids, is_match=False))


def larger_matching_parts(
    image: ImageKeys, text: Tokens, negatives: Negatives
) -> Iterator[MatchingPart]:
    """Yield the pairs of `matching_parts` in two parts: each image with its two texts, the rest.

    Each part reads every weight and adds to every gradient: four parts do so twice as often, which
    is a tenth of a step where products are as fast as bfloat16's on a processor that has it. A GPU
    gets few pairs all at once: its kernels are too small otherwise. For one process.
    """
    rows = negatives.text_for_image
    if text.ids.device.type != "cpu" and len(rows) <= _FEW:
        own = torch.arange(len(rows), device=rows.device)
        keys = image.select(torch.cat([own, negatives.image_for_text, own]))
        all_ids, masks = (torch.cat([item, item, item[rows]]) for item in (text.ids, text.mask))
        is_match = torch.arange(len(all_ids), device=rows.device) < len(rows)
        yield MatchingPart(keys, Tokens(all_ids, masks), is_match)
        return
    both = Tokens(
        *(torch.stack([item, item[rows]], dim=1).flatten(0, 1) for item in (text.ids, text.mask))
    )
    # Computed where it is read: a tensor of Python's numbers would be copied to a GPU.
    is_match = torch.arange(len(both.ids), device=text.ids.device) % 2 == 0
    yield MatchingPart(image, both, is_match)
    keys = image.select(negatives.image_for_text)
    yield MatchingPart(keys, text, _all_match(text.ids, is_match=False))


@dataclass(frozen=True)
class MatchingPart:
    """Some of a batch's pairs that are read together."""

    image: ImageKeys
    """Of the pairs' images, or of fewer that several texts in a row each ask about."""
    text: Tokens
    is_match: Tensor
    """[pairs]."""


def _all_match(ids: Tensor, *, is_match: bool) -> Tensor:
    return torch.full((len(ids),), is_match, device=ids.device)


def pair_logits(bridge: Bridge, part: MatchingPart) -> Tensor:
    """Return matching logits [pairs, 2]."""
    text = part.text
    hidden = bridge.qformer.encode_pair(part.image, text.ids, text.mask, queries_only=True)
    return bridge.alignment.match(hidden)
