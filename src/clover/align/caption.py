"""Image-grounded text generation, ITG (SPEC, section 2.3)."""

from __future__ import annotations

from torch import Tensor

from clover.qformer.bridge import AlignmentHeads
from clover.qformer.vocabulary import NO_TARGET, vocabulary_loss
from clover.training import processes


def caption_inputs(ids: Tensor, *, decode_start: int) -> Tensor:
    """Return ids [B, T] whose `[CLS]` has become `[DEC]`."""
    inputs = ids.clone()
    inputs[:, 0] = decode_start
    return inputs


def caption_loss(
    hidden: Tensor,
    inputs: Tensor,
    mask: Tensor,
    *,
    heads: AlignmentHeads,
    word_embedding: Tensor,
    label_smoothing: float,
) -> Tensor:
    """Predict each next word; logits are computed only where there is one to predict.

    Args:
        hidden: [B, T, D] from `QFormer.decode_text`.
        inputs: [B, T], beginning with `[DEC]`.
        mask: [B, T], 1 = a token.
        heads: Holds the next-word head.
        word_embedding: [V, D], the tied decoder.
        label_smoothing: 0.1 as published, spread over the whole vocabulary.

    Returns:
        The mean over predicted words. Of several processes each returns its share, so that the
        mean over processes is the mean over all their words.
        # Paper: averages the processes' means, in which a word counts for more where captions are
        # short; here every word counts alike, so that the batch may be shared in any way.
    """
    has_target = mask[:, 1:].bool()
    if mask.device.type == "cpu":
        rows, targets = hidden[:, :-1][has_target], inputs[:, 1:][has_target]
    else:
        # To leave padding out is to wait for a GPU to say how much it is, and no shape is fixed.
        rows = hidden[:, :-1].flatten(0, 1)
        targets = inputs[:, 1:].masked_fill(~has_target, NO_TARGET).flatten()
    loss = vocabulary_loss(
        heads.language.transform(rows),
        word_embedding,
        heads.language.bias,
        targets,
        smoothing=label_smoothing,
    )
    if processes.num_processes() > 1:
        words = has_target.sum()
        loss = loss * words * processes.num_processes() / processes.sum_over_processes(words)
    return loss
