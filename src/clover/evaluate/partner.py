"""Whose image a record is shown in the control with another image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from clover.evaluate.interval import cluster_codes

_DRAWS = 51
"""At random over all records, before those of other groups are searched for."""


def choose_partners(
    groups: Sequence[str], digests: Sequence[str], random: np.random.Generator
) -> list[int]:
    """Choose for each record another one whose image it is shown.

    One of another group with another image; where there is none, one of the same group with
    another image; only where all records show one and the same image, the record itself.

    Args:
        groups: Of each of N records: patient, slide or source image.
        digests: Of each record's image.
        random: Draws the partners.

    Returns:
        N places of records.
    """
    group_of, image_of = cluster_codes(groups), cluster_codes(digests)  # [N]
    size = len(groups)
    num_draws = _DRAWS if len(np.unique(group_of)) > 1 else 0
    partners = []
    for index in range(size):
        for _ in range(num_draws):
            other = int(random.integers(size))
            if group_of[other] != group_of[index] and image_of[other] != image_of[index]:
                break
        else:
            other = _searched(group_of, image_of, index, random)
        partners.append(other)
    return partners


def _searched(
    group_of: NDArray[np.int64],
    image_of: NDArray[np.int64],
    index: int,
    random: np.random.Generator,
) -> int:
    """Return a partner where drawing found none; the record itself where there is none."""
    is_other = image_of != image_of[index]  # [N]
    elsewhere = np.flatnonzero(is_other & (group_of != group_of[index]))
    found = elsewhere if len(elsewhere) else np.flatnonzero(is_other)
    return int(random.choice(found)) if len(found) else index
