"""Answers of another kind than the question asks for: an organ for a cell, a disease for a tissue.

In: a question and its answer. Out: the reason why they do not belong together, or None. What small
models get wrong first: each half is true, and the two have nothing to do with each other.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from clover.instruct.lists import load_yaml, phrase_pattern, words
from clover.instruct.vocabulary import content_stems, dictionary

_NAMED_ALONE = 4
"""An answer of at most so many words may be an organ's name and nothing else."""
_GROWTH = re.compile(r"\w{3,}oma(?:s|ta)?\b", re.IGNORECASE)
_TISSUE = re.compile(r"mucosa|epithelium|stroma|tissue|lamina|muscularis", re.IGNORECASE)
_CELL = re.compile(r"cell|cyte|phage|blast|phil|nucle", re.IGNORECASE)
_NUMBER = re.compile(r"\d")
_HEADING = re.compile(r"^(?:[^:]{1,40}:\s*)+")


def mismatch(question: str, answer: str) -> str | None:
    """Return why an answer cannot answer its question, or None."""
    if answer.lower().startswith(("yes", "no ", "no,")):
        return None
    for kind, check in _CHECKS:
        if _named(kind).search(question):
            reason = check(answer)
            if reason is not None:
                return f"mismatch: {reason}"
    if answer.lower().strip(" .") in load_yaml("dictionary/atlas")["systems"]:
        return "mismatch: an atlas's heading is no answer"
    if _is_organ(answer) and not words("where").search(question):
        return "mismatch: an organ answers what did not ask for one"
    return None


def _is_organ(answer: str) -> bool:
    """Say whether an answer is an organ's name and nothing else."""
    named = _HEADING.sub("", answer) or answer
    if len(named.split()) > _NAMED_ALONE:
        return False
    parts = {stem for part in dictionary("body_parts").stated(named) for stem in _stems(part)}
    return bool(parts) and set(content_stems(named)) <= parts


def _no_tissue(answer: str) -> str | None:
    is_disease = dictionary("diagnoses").stated(answer) or dictionary("findings").stated(answer)
    if len(answer.split()) > _NAMED_ALONE or not is_disease:
        return None
    if dictionary("body_parts").stated(answer) or re.search(r"tissue|cells\b", answer, re.I):
        return None
    return "a disease answers what asked for a tissue"


def _no_cell(answer: str) -> str | None:
    is_tissue = dictionary("body_parts").stated(answer) or _TISSUE.search(answer)
    if not is_tissue or _CELL.search(answer) or len(content_stems(answer)) > 3:
        return None
    return "a tissue answers what asked for cells"


def _no_size(answer: str) -> str | None:
    if _named("sizes").search(answer) or _NUMBER.search(answer):
        return None
    return "the answer names no size"


def _no_growth(answer: str) -> str | None:
    is_named = dictionary("diagnoses").mentions(answer) or _GROWTH.search(answer)
    if is_named or _named("growths").search(answer):
        return None
    return "the answer names no kind of tumor"


def _a_person(_: str) -> str | None:
    return "the question asks who the patient is"


_CHECKS: tuple[tuple[str, Callable[[str], str | None]], ...] = (
    ("person", _a_person),
    ("tissue", _no_tissue),
    ("cell", _no_cell),
    ("size", _no_size),
    ("tumor", _no_growth),
)


@functools.cache
def _named(kind: str) -> re.Pattern[str]:
    return phrase_pattern(load_yaml("dictionary/question")[kind])


def _stems(term: str) -> set[str]:
    variants = [term, *load_yaml("dictionary/body_parts")[term]]
    return {stem for variant in variants for stem in content_stems(variant)}
