"""What a file's answers give away without any image: majority and question-only baselines."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.int64]
Floats = NDArray[np.float64]


class _Rivals(NamedTuple):
    """For each item: how often its answer, and the strongest other answer, stand in its group."""

    own: Codes
    other: Codes
    num_other: Codes
    """How many other answers are that strong."""
    group_size: Codes


def _rivals(groups: Codes, answers: Codes) -> _Rivals:
    width = int(answers.max()) + 1
    keys, place, counts = np.unique(
        groups * width + answers, return_inverse=True, return_counts=True
    )
    _, starts, of_group = np.unique(keys // width, return_index=True, return_inverse=True)
    top = np.maximum.reduceat(counts, starts)[of_group]
    is_top = counts == top
    num_top = np.add.reduceat(is_top.astype(np.int64), starts)[of_group]
    below = np.where(is_top, 0, counts)
    second = np.maximum.reduceat(below, starts)[of_group]
    num_second = np.add.reduceat((below == second).astype(np.int64), starts)[of_group]
    leads_alone = is_top & (num_top == 1)
    other = np.where(leads_alone, second, top)
    num_other = np.where(leads_alone, num_second, num_top - is_top)
    size = np.add.reduceat(counts, starts)[of_group]
    return _Rivals(counts[place], other[place], num_other[place], size[place])


def _credit(rivals: _Rivals, *, is_yes_no: bool) -> Floats:
    left = rivals.own - 1  # the item itself may not vote
    ties = (left == rivals.other) & (left > 0)
    hits = np.where(left > rivals.other, 1.0, np.where(ties, 1 / (1 + rivals.num_other), 0.0))
    if is_yes_no:
        # Leaving one out of a balanced group always leaves its answer in the minority, which
        # would score 0 where guessing scores half: a lead of one is no lead.
        level = (abs(rivals.own - rivals.other) <= 1) & (rivals.other > 0)
        hits = np.where(level, 0.5, hits)
    return hits


def question_only(questions: Codes, answers: Codes, *, is_yes_no: bool) -> float | None:
    """Return the percentage right of giving each question its most frequent answer, or None.

    An item's own answer is left out; equally frequent answers share the hit; a question asked
    once gets the most frequent answer of all.

    Args:
        questions: [N] codes of the question's form or text.
        answers: [N] codes of the normalised gold answers.
        is_yes_no: Whether the answers are yes and no.
    """
    if not len(questions):
        return None
    rivals = _rivals(questions, answers)
    everything = _rivals(np.zeros_like(questions), answers)
    hits = np.where(
        rivals.group_size > 1,
        _credit(rivals, is_yes_no=is_yes_no),
        _credit(everything, is_yes_no=is_yes_no),
    )
    # fsum is exact, so that the order of the rows cannot change the last digit.
    return 100 * math.fsum(hits) / len(hits)


def majority(answers: Codes) -> float | None:
    """Return the percentage right of always giving the most frequent answer, or None."""
    if not len(answers):
        return None
    return 100 * float(np.bincount(answers).max()) / len(answers)
