"""The losses of a step whose largest graphs are never held together.

Contrast and caption share the queries' pass and go backward first. Matching runs three pairs for
each one of the batch, two thirds of a step's activations. It shares nothing with them but the image
keys and the weights, and its loss is a mean over pairs: they follow a third at a time or less (two
thirds in half precision, in one process), each forward and backward before the next begins. Last
come the image projections, with the sum of all passes' gradients of their keys. Sums
of gradients are what autograd makes of one backward, in another order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clover.align.losses import (
    ALL_LOSSES,
    AlignmentLosses,
    Everyone,
    LossSettings,
    compare,
    larger_matching_parts,
    matching_parts,
    pair_logits,
)
from clover.align.match import Negatives, matching_share
from clover.core.number_format import without_autocast
from clover.qformer.bridge import Bridge
from clover.qformer.model import ImageKeys
from clover.qformer.tokenizer import Tokens
from clover.qformer.used_words import looked_up_once


def backward_apart(
    bridge: Bridge,
    features: Tensor,
    text: Tokens,
    settings: LossSettings,
    *,
    everyone: Everyone | None = None,
    negatives: Negatives | None = None,
    scale: float = 1.0,
) -> AlignmentLosses:
    """Compute the losses of `losses.alignment_losses` and add their gradients to the weights'.

    Args:
        bridge: With alignment heads.
        features: Image tokens [B, P, E] as the encoder gave them.
        text: Their captions.
        settings: Which losses, and how.
        everyone: The pairs of all processes, where there are several.
        negatives: Given ones, for tests; drawn by similarity otherwise.
        scale: Factor of the gradients.

    Returns:
        The losses, detached.
    """
    projected = bridge.read_image(features)
    keys = ImageKeys(tuple((_leaf(key), _leaf(value)) for key, value in projected.layers))
    words = settings.words(text if everyone is None else everyone.text)
    with looked_up_once(bridge.qformer, words):
        compared = compare(bridge, keys, text, settings, everyone)
        parts: dict[str, Tensor] = {}
        if "match" in settings.which and negatives is None:
            negatives = compared.negatives()
        if "contrast" in settings.which:
            parts["contrast"] = compared.contrast()
        if "caption" in settings.which:
            parts["caption"] = compared.caption(bridge, text)
        if parts:
            _backward(torch.stack(list(parts.values())).sum() * scale)
        found = {name: part.detach() for name, part in parts.items()}
        similar = compared.similar.detach()
        del compared, parts
        if "match" in settings.which:
            assert negatives is not None, "drawn above"
            found["match"] = torch.zeros((), device=features.device)
            pairs = 3 * len(text.ids)
            # In half precision what a part holds until it has gone back is half as large, and
            # products are so fast that reading the weights again for each part is felt.
            if keys.layers[0][0].element_size() < 4 and everyone is None:
                parts_of = larger_matching_parts(keys, text, negatives)
            else:
                parts_of = matching_parts(bridge, keys, text, negatives, everyone)
            for part in parts_of:
                logits = pair_logits(bridge, part)
                share = matching_share(logits, part.is_match, pairs=pairs)
                _backward(share * scale)
                found["match"] += share.detach()
                del part, logits, share
    _backward_into(projected, keys)
    return AlignmentLosses({name: found[name] for name in ALL_LOSSES if name in found}, similar)


def _leaf(value: Tensor) -> Tensor:
    """Return the same numbers, at which the way back stops and gradients add up."""
    return value.detach().requires_grad_(value.requires_grad)


def _backward(loss: Tensor) -> None:
    # Outside autocast, as a loop's own backward is: gradients are not converted on their way.
    with without_autocast(loss.device):
        loss.backward()  # type: ignore[no-untyped-call]


def _backward_into(projected: ImageKeys, keys: ImageKeys) -> None:
    """Carry the gradients of the cut keys on into the projections."""
    pairs = zip(projected.layers, keys.layers, strict=True)
    cut = [both for layer in pairs for both in zip(*layer, strict=True)]
    reached = [(whole, leaf.grad) for whole, leaf in cut if leaf.grad is not None]
    if reached:
        wholes, grads = [whole for whole, _ in reached], [grad for _, grad in reached]
        with without_autocast(wholes[0].device):
            torch.autograd.backward(wholes, grads)
