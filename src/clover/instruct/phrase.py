"""Phrases of a caption that may stand as an answer: what a small model is allowed to copy.

In: a caption. Out: runs of its own words that begin and end where a phrase may, so that "of the"
is none and "branched crypts" is one. What the caption denies or doubts is taken with its "no" or
"possible", or not at all.
"""

from __future__ import annotations

import functools
import re

from clover.instruct.description import describe
from clover.instruct.lists import load_yaml
from clover.instruct.standing import standing

MAX_WORDS = 14
MAX_PHRASES = 200
"""Hosted endpoints accept enumerations of some hundreds of values."""

# Commas too: what stands on their two sides is seldom one phrase.
_PIECE = re.compile(r"[^.;:,!?()]+")


def phrases(caption: str) -> list[str]:
    """Return the phrases of a caption, in its order, at most `MAX_PHRASES`; the shorter first kept.

    Args:
        caption: Plain text; dates, magnifications, headings and remarks are left out.
    """
    text = describe(caption)
    found: dict[str, None] = {}
    for piece in _PIECE.finditer(text):
        for start, end in _spans(piece.group()):
            first, last = piece.start() + start, piece.start() + end
            if standing(text, first, last) == "stated":
                found.setdefault(text[first:last], None)
    if len(found) > MAX_PHRASES:
        shortest = set(sorted(found, key=lambda phrase: len(phrase.split()))[:MAX_PHRASES])
        return [phrase for phrase in found if phrase in shortest]
    return list(found)


@functools.cache
def _joints() -> frozenset[str]:
    return frozenset(load_yaml("dictionary/language")["joints"])


def _spans(piece: str) -> list[tuple[int, int]]:
    """Return where phrases of a piece without punctuation begin and end."""
    starts: list[tuple[int, int]] = []  # word number, character
    ends: list[tuple[int, int]] = []
    was_joint, place = True, 0
    for number, word in enumerate([*re.finditer(r"\S+", piece), None]):
        is_joint = word is None or word.group().lower() in _joints()
        if word is not None and was_joint and not is_joint:
            starts.append((number, word.start()))
        elif is_joint and not was_joint:
            ends.append((number, place))
        was_joint = is_joint
        place = word.end() if word is not None else place
    return [
        (start, end)
        for first, start in starts
        for last, end in ends
        if first < last <= first + MAX_WORDS
    ]
