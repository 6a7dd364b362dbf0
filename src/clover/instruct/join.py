"""Several questions about one image asked at once: more answers for each pass of the model.

A short answer costs the language model nearly as much as three: most of its tokens are image and
prompt. Joined questions are answered in their order, separated by semicolons.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

from clover.core.record import Record


def join_questions(
    records: Sequence[Record], *, share: float, size: int = 3, seed: int = 0
) -> list[Record]:
    """Join a share of the questions of each image in groups of `size`; leave the rest alone.

    Args:
        records: Questions with answers.
        share: Of an image's questions that are joined, 0 to 1.
        size: Questions in a group, at least 2.
        seed: Which are joined, and in which order they are asked.

    Returns:
        Joined records first (open; `origin` and the rest as the group's first), then the others.
    """
    chance = random.Random(seed)
    by_image: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_image[record.image or record.id].append(record)
    joined: list[Record] = []
    single: list[Record] = []
    for found in by_image.values():
        chance.shuffle(found)
        # Rounded by chance, so that a small share of few questions is not always none.
        groups = int(len(found) * share / size + chance.random())
        groups = min(groups, len(found) // size)
        for start in range(0, groups * size, size):
            joined.append(_joined(found[start : start + size]))
        single += found[groups * size :]
    return joined + single


def _joined(group: Sequence[Record]) -> Record:
    first = group[0]
    return first.model_copy(
        update={
            "id": "+".join(record.id for record in group),
            "question": " ".join(record.question or "" for record in group),
            "answer": "; ".join(record.answer or "" for record in group),
            "answer_type": "open",
            "form": "joined",
        }
    )
