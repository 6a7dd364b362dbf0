"""A large contrastive batch in the memory of a small one: gradient caching (Gao et al. 2021).

The contrast compares every pair with every other, so its batch cannot simply be cut. But it sees a
pair through two sets of vectors alone: these are computed first, without a graph, chunk by chunk;
the loss over all of them gives their gradients; then each chunk is computed again, with a graph and
the same dropout, and the gradients are carried on into the weights. Matching draws its negatives
from the whole batch too; it and the caption loss are means, and are taken chunk by chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clover.align.contrast import contrastive_loss, same_caption, similarity
from clover.align.losses import (
    ALL_LOSSES,
    AlignmentLosses,
    Everyone,
    LossSettings,
    captioning_loss,
    match_logits,
)
from clover.align.match import Negatives, matching_loss, sample_negatives
from clover.core.errors import CloverError
from clover.qformer.bridge import Bridge
from clover.qformer.model import ImageKeys, QueryPass
from clover.qformer.tokenizer import Tokens
from clover.qformer.used_words import looked_up_once
from clover.training import processes


def backward_in_chunks(
    bridge: Bridge,
    features: Tensor,
    text: Tokens,
    settings: LossSettings,
    *,
    chunk: int,
    negatives: Negatives | None = None,
    scale: float = 1.0,
) -> AlignmentLosses:
    """Compute the losses of `losses.alignment_losses` and add their gradients to the weights'.

    Args and result are those of `apart.backward_apart`, for one process; `chunk` pairs have a graph
    at a time.

    Raises:
        CloverError: several processes train together, whose negatives this does not gather.
    """
    if processes.num_processes() > 1:
        raise CloverError(
            "align.gradient_chunk is for one process; with several, each has a share of the "
            "batch already: set it to 0"
        )
    step = _Chunks(bridge, features, text, settings)
    parts = [slice(start, start + chunk) for start in range(0, len(features), chunk)]
    states, image_vectors, text_vectors = [], [], []
    with torch.no_grad():
        for part in parts:
            states.append(_random_state(features.device))
            found = step.vectors(part)
            image_vectors.append(found.image)
            text_vectors.append(found.text)
    image_leaf = torch.cat(image_vectors).requires_grad_()
    text_leaf = torch.cat(text_vectors).requires_grad_()
    similar = similarity(
        image_leaf,
        text_leaf,
        bridge.alignment.temperature,
        all_image=image_leaf.detach() if settings.detach_gathered else None,
        all_text=text_leaf.detach() if settings.detach_gathered else None,
    )
    ignored = same_caption(text.ids, text.mask) if settings.ignore_duplicates else None
    losses: dict[str, Tensor] = {}
    if "contrast" in settings.which:
        contrast = contrastive_loss(
            similar, label_smoothing=settings.label_smoothing, ignored=ignored
        )
        (contrast * scale).backward()  # type: ignore[no-untyped-call]
        losses["contrast"] = contrast.detach()
    similar = similar.detach()
    if "match" in settings.which and negatives is None:
        negatives = sample_negatives(similar, ignored=ignored)
    onward = _random_state(features.device)
    with looked_up_once(bridge.qformer, settings.words(text)):
        for part, state in zip(parts, states, strict=True):
            _set_random_state(state)  # the dropout of the first time
            found = step.vectors(part)
            _set_random_state(onward)  # and fresh dropout for what is done once
            terms = step.terms(part, found, negatives)
            for name, value in terms.items():
                losses[name] = losses.get(name, torch.zeros_like(value)) + value.detach()
            total = torch.zeros((), device=features.device)
            for value in terms.values():
                total = total + value * scale
            if image_leaf.grad is not None and text_leaf.grad is not None:
                total = total + (found.image * image_leaf.grad[part]).sum()
                total = total + (found.text * text_leaf.grad[part]).sum()
            total.backward()  # type: ignore[no-untyped-call]
            onward = _random_state(features.device)
    return AlignmentLosses({name: losses[name] for name in ALL_LOSSES if name in losses}, similar)


@dataclass(frozen=True)
class _Vectors:
    """What the contrast sees of some pairs, and the passes it came from."""

    image: Tensor
    text: Tensor
    keys: ImageKeys
    queries: QueryPass


@dataclass(frozen=True)
class _Chunks:
    """One batch, of which a part at a time is computed."""

    bridge: Bridge
    features: Tensor
    text: Tokens
    settings: LossSettings

    def vectors(self, part: slice) -> _Vectors:
        """Return the unit vectors of some pairs: images [b, Q, C], texts [b, C]."""
        bridge, heads = self.bridge, self.bridge.alignment
        keys = bridge.read_image(self.features[part])
        queries = bridge.qformer.encode_queries(keys)
        rows = bridge.qformer.encode_text(self.text.ids[part], self.text.mask[part], first_row=True)
        image = heads.embed_image(queries.hidden)
        return _Vectors(image, heads.embed_text(rows[:, 0]), keys, queries)

    def terms(self, part: slice, found: _Vectors, negatives: Negatives | None) -> dict[str, Tensor]:
        """Return what some pairs add to the matching and the caption loss of the batch."""
        terms: dict[str, Tensor] = {}
        text = Tokens(self.text.ids[part], self.text.mask[part])
        if "match" in self.settings.which:
            assert negatives is not None, "matching needs negatives"
            logits = match_logits(
                self.bridge,
                found.keys,
                text,
                Negatives(negatives.image_for_text[part], negatives.text_for_image[part]),
                Everyone(self.features, self.text, part.start),
            )
            terms["match"] = matching_loss(logits) * (len(found.text) / len(self.features))
        if "caption" in self.settings.which:
            share = float(text.mask[:, 1:].sum() / self.text.mask[:, 1:].sum())
            if share:
                loss = captioning_loss(self.bridge, text, found.queries, self.settings)
                terms["caption"] = loss * share
        return terms


_Random = tuple[Tensor, Tensor | None]


def _random_state(device: torch.device) -> _Random:
    gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), gpu


def _set_random_state(state: _Random) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
