"""The loop that writes answers token by token, for any model that can take one step.

In: the logits after the prompt and a `Stepper`. Out: token ids, step by step, so that batched
generation and streaming are the same code. Rows that have ended stop being computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from clover.core.errors import CloverError
from clover.language.protocol import GenerationSettings
from clover.language.tokens import Tokens

_WORTH_DROPPING = 8
"""One row of so many that has ended is worth copying the cache of the others."""
_COLDEST = 1e-5
"""Lower temperatures are greedy: that is their limit, and in float32 logits divided by them are
infinite or not numbers. vLLM draws the line at the same place."""


class Stepper(Protocol):
    """A model with its cache in the middle of a generation."""

    def step(self, ids: Tensor) -> Tensor:
        """Append one token a row (`[B]`) and return the next logits `[B, V]`."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (indices `[N]`) only."""
        ...


class Constraint(Protocol):
    """What one row may still write."""

    def allowed(self) -> Tensor:
        """Return which tokens may come next: booleans, at least `[V]`."""
        ...

    def accept(self, token: int) -> None:
        """Take note of the token that was written."""
        ...


def iterate_tokens(
    logits: Tensor,
    stepper: Stepper,
    settings: GenerationSettings,
    *,
    stop_ids: frozenset[int],
    seeds: Sequence[int] | None = None,
    constraints: Sequence[Constraint | None] | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """Yield, step by step, the (row, token id) pairs of the rows that are still writing.

    Args:
        logits: scores of the first token `[B, V]`.
        stepper: takes the following steps.
        settings: `num_beams` is not read here.
        stop_ids: tokens that end a row; they are yielded as the row's last token.
        seeds: one seed a row; `settings.seed` for every row when absent.
        constraints: one a row, or none, of what it may write.
    """
    rows = list(range(len(logits)))
    written: list[list[int]] = [[] for _ in rows]
    generators = [
        torch.Generator(logits.device).manual_seed(seed)
        for seed in (seeds if seeds is not None else [settings.seed] * len(rows))
    ]
    ended: set[int] = set()
    for position in range(settings.max_tokens):
        scores = _adjust(logits.float(), [written[row] for row in rows], settings)
        if position < settings.min_tokens:
            scores[:, list(stop_ids)] = -torch.inf
        if constraints is not None:
            _confine(scores, [None if row in ended else constraints[row] for row in rows])
        ids = _pick(scores, settings, [generators[row] for row in rows])
        values = ids.tolist()
        pairs = [(row, token) for row, token in zip(rows, values, strict=True) if row not in ended]
        for row, token in pairs:
            written[row].append(token)
            if token in stop_ids:
                ended.add(row)
            elif constraints is not None and (constraint := constraints[row]) is not None:
                constraint.accept(token)
        yield pairs
        alive = [index for index, row in enumerate(rows) if row not in ended]
        if not alive or position + 1 == settings.max_tokens:
            return
        # Copying the cache costs a little of a step: not for one row of many.
        if len(rows) - len(alive) >= max(1, len(rows) // _WORTH_DROPPING):
            kept = torch.tensor(alive, device=logits.device)
            stepper.keep(kept)
            ids = ids[kept]
            rows = [rows[index] for index in alive]
        logits = stepper.step(ids)


def next_token(
    scores: Tensor,
    written: list[int],
    settings: GenerationSettings,
    generator: torch.Generator,
    *,
    stop_ids: frozenset[int],
    constraint: Constraint | None = None,
) -> int:
    """Return what one row writes next, as `iterate_tokens` would choose it.

    Args:
        scores: logits `[V]`; they are changed.
        written: the row's tokens so far.
        settings: `max_tokens` and `num_beams` are not read here.
        generator: of sampling.
        stop_ids: tokens that end the row.
        constraint: of what the row may write; it takes note of the token.
    """
    row = _adjust(scores.float()[None], [written], settings)
    if len(written) < settings.min_tokens:
        row[:, list(stop_ids)] = -torch.inf
    if constraint is not None:
        _confine(row, [constraint])
    token = int(_pick(row, settings, [generator]))
    if constraint is not None and token not in stop_ids:
        constraint.accept(token)
    return token


def collect_tokens(steps: Iterator[list[tuple[int, int]]], num_rows: int) -> list[list[int]]:
    """Run the loop to its end and return each row's token ids, end token included."""
    written: list[list[int]] = [[] for _ in range(num_rows)]
    for pairs in steps:
        for row, token in pairs:
            written[row].append(token)
    return written


def stream_text(steps: Iterator[list[tuple[int, int]]], tokens: Tokens) -> Iterator[str]:
    """Yield one row's text in pieces, whole characters only."""
    ids: list[int] = []
    shown = ""
    for pairs in steps:
        ids += [token for _, token in pairs]
        text = tokens.decode(ids)
        # A character may need several tokens; half of one decodes to the replacement sign.
        if text.endswith("\ufffd") or not text.startswith(shown):
            continue
        if text != shown:
            yield text[len(shown) :]
            shown = text
    text = tokens.decode(ids)
    if text != shown and text.startswith(shown):
        yield text[len(shown) :]


def _adjust(scores: Tensor, written: list[list[int]], settings: GenerationSettings) -> Tensor:
    """Apply the repetition penalty to tokens already written, in place.

    Source: Keskar et al. 2019, section 4.1.
    """
    if settings.repetition_penalty == 1.0:
        return scores
    for row, ids in enumerate(written):
        if ids:
            seen = torch.tensor(sorted(set(ids)), device=scores.device)
            old = scores[row, seen]
            penalty = settings.repetition_penalty
            scores[row, seen] = torch.where(old < 0, old * penalty, old / penalty)
    return scores


def _confine(scores: Tensor, constraints: Sequence[Constraint | None]) -> None:
    """Leave each row of `[B, V]` only the tokens that its constraint allows, in place.

    Raises:
        CloverError: the constraint allows none.
    """
    for row, constraint in enumerate(constraints):
        if constraint is not None:
            allowed = constraint.allowed()[: scores.shape[1]]
            if not allowed.any():
                raise CloverError(
                    "no token of this model can go on within the schema; its tokenizer lacks "
                    "what JSON is written with"
                )
            scores[row, ~allowed.to(scores.device)] = -torch.inf


def _pick(
    scores: Tensor, settings: GenerationSettings, generators: Sequence[torch.Generator]
) -> Tensor:
    """Choose the next token of each row: `[B, V]` to `[B]`."""
    if settings.temperature < _COLDEST:
        return scores.argmax(dim=-1)
    probabilities = torch.softmax(scores / settings.temperature, dim=-1)
    if settings.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        # A token is dropped when the likelier ones alone already reach top_p.
        dropped = ordered.cumsum(dim=-1) - ordered >= settings.top_p
        dropped[:, 0] = False  # also where top_p is 0 in float32
        probabilities = probabilities.masked_fill(dropped.scatter(1, order, dropped), 0.0)
    # A generator a row: what a row says does not depend on who shares its batch.
    drawn = [
        torch.multinomial(row, 1, generator=generator)
        for row, generator in zip(probabilities, generators, strict=True)
    ]
    return torch.cat(drawn)
