"""Captions from the next-word head of stage 1 (SPEC, section 2.5): beam search behind `[DEC]`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clover.qformer.attention import KeyValue
from clover.qformer.bridge import Bridge


@dataclass(frozen=True)
class CaptionSettings:
    """How a caption is searched for; the defaults are the published ones."""

    num_beams: int = 3
    max_length: int = 30
    """Longest row, `[DEC]` included."""
    min_length: int = 10
    """`[SEP]` may not come before the row, `[DEC]` included, is so long."""


@torch.no_grad()
def write_caption(
    bridge: Bridge,
    cache: tuple[KeyValue, ...],
    *,
    start: int,
    end: int,
    settings: CaptionSettings | None = None,
) -> list[int]:
    """Return the likeliest caption's ids, without `[DEC]` and `[SEP]`.

    Beams are compared by log-likelihood divided by their length.

    Args:
        bridge: With alignment heads.
        cache: Of one image, from `QFormer.encode_queries`.
        start: Id of `[DEC]`.
        end: Id of `[SEP]`.
        settings: Search; the published when absent.
    """
    settings = settings or CaptionSettings()
    device = cache[0][0].device
    rows = torch.tensor([[start]], device=device)
    scores = torch.zeros(1, device=device)
    finished: list[tuple[float, list[int]]] = []
    while rows.shape[1] < settings.max_length:
        logits = _next(bridge, cache, rows)
        if rows.shape[1] < settings.min_length:
            logits[:, end] = -torch.inf
        likely = scores[:, None] + logits.log_softmax(dim=1)  # [beams, V]
        count = min(2 * settings.num_beams, likely.numel())
        best, flat = likely.flatten().topk(count)
        kept: list[tuple[float, int, int]] = []
        for value, place in zip(best.tolist(), flat.tolist(), strict=True):
            beam, word = divmod(place, likely.shape[1])
            if word == end:
                finished.append((value / rows.shape[1], rows[beam, 1:].tolist()))
            elif len(kept) < settings.num_beams:
                kept.append((value, beam, word))
        finished = sorted(finished, reverse=True)[: settings.num_beams]
        rows = torch.cat(
            [
                rows[[beam for _, beam, _ in kept]],
                torch.tensor([[word] for _, _, word in kept], device=device),
            ],
            dim=1,
        )
        scores = torch.tensor([value for value, _, _ in kept], device=device)
        done = len(finished) == settings.num_beams
        if done and finished[-1][0] >= kept[0][0] / (rows.shape[1] - 1):
            break
    else:
        finished += [
            (value / (rows.shape[1] - 1), row[1:])
            for value, row in zip(scores.tolist(), rows.tolist(), strict=True)
        ]
    return max(finished)[1]


def _next(bridge: Bridge, cache: tuple[KeyValue, ...], rows: Tensor) -> Tensor:
    """Return logits [beams, V] of the word behind each row [beams, T]."""
    beams = len(rows)
    shared = tuple(
        (key.expand(beams, -1, -1, -1), value.expand(beams, -1, -1, -1)) for key, value in cache
    )
    hidden = bridge.qformer.decode_text(rows, torch.ones_like(rows), shared)
    words = bridge.qformer.word_embedding.weight
    logits: Tensor = bridge.alignment.language(hidden[:, -1], words)
    return logits.float()
