"""Two ways of making two texts comparable: the published VQA normaliser, and the strict one.

The VQA normaliser is kept with all its oddities (METRICS, section 1.1), because published numbers
depend on them. The strict one is what SQuAD does.
"""

from __future__ import annotations

import re
import string
import unicodedata
from functools import lru_cache
from importlib.resources import files
from typing import Any

import yaml

_LONGEST_CACHED = 64
_MOST_CACHED = 1 << 16
"""Words repeat, so their normal forms are kept; essays without a space would fill the memory."""


def _vqa_words() -> tuple[dict[str, str], frozenset[str]]:
    """Return what each special word becomes (an article: nothing), and the articles."""
    text = files("clover.evaluate.protocol").joinpath("contractions.yaml").read_text("utf-8")
    data: dict[str, Any] = yaml.safe_load(text)
    special: dict[str, str] = {**data["reversed"], **data["numbers"]}
    for form in data["forms"].split():
        for place in (at for at, letter in enumerate(form) if letter == "'"):
            special[form[:place] + form[place + 1 :]] = form
    special.update(dict.fromkeys(data["articles"], ""))
    return special, frozenset(data["articles"])


_SPECIAL, _ARTICLES = _vqa_words()
_VQA_PUNCTUATION = re.compile(r"[;/\[\]\"{}()=+\\_\-><@`,?!]")
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32


def vqa_normalise(text: str) -> str:
    """Return the normal form of an already lower-cased text.

    Punctuation becomes a space, or vanishes if any such mark stands beside a space (each mark
    for itself) or a comma stands between digits (all marks); at most 32 full stops vanish.

    Source: METRICS, section 1.1.
    """
    marks = set(_VQA_PUNCTUATION.findall(text))
    has_number_comma = "," in marks and _DIGIT_COMMA_DIGIT.search(text) is not None
    spaced = text
    for mark in marks:
        vanishes = has_number_comma or f"{mark} " in text or f" {mark}" in text
        spaced = spaced.replace(mark, "" if vanishes else " ")
    if "." in spaced:
        spaced = _PERIOD.sub("", spaced, count=_MOST_PERIODS)
    become = _SPECIAL.get
    words = spaced.split()
    return " ".join(filter(None, map(become, words, words)))


_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)


class _StrictWords(dict[str, str]):
    """Raw word -> lower-case word without punctuation, filled as words come."""

    def __init__(self, left_out: frozenset[str]) -> None:
        super().__init__()
        self._left_out = left_out

    def __missing__(self, raw: str) -> str:
        word = raw.lower()
        if not word.isascii():
            composed = unicodedata.normalize("NFC", word)
            word = "".join(mark for mark in composed if unicodedata.category(mark)[0] != "P")
        word = word.translate(_ASCII_PUNCTUATION)
        word = "" if word in self._left_out else word
        if len(raw) <= _LONGEST_CACHED:
            if len(self) >= _MOST_CACHED:
                self.clear()
            self[raw] = word
        return word


_WORDS = _StrictWords(_ARTICLES)
_WORDS_WITH_ARTICLES = _StrictWords(frozenset())


@lru_cache(maxsize=8)  # the same item is asked for several times, one after the other
def strict_words(text: str) -> list[str]:
    """Return lower-case words without punctuation and articles, as SQuAD does.

    Where only articles are left they stay: "A" is an answer too. Unicode punctuation goes with
    the rest, and accents are composed. The list is remembered: read it, do not change it.
    """
    raw = text.split()
    return list(filter(None, map(_WORDS.__getitem__, raw))) or list(
        filter(None, map(_WORDS_WITH_ARTICLES.__getitem__, raw))
    )


_YES_NO = re.compile(r"(?<![^\W_])(yes|no)(?![^\W_])")


@lru_cache(maxsize=8)
def first_yes_no(text: str) -> str | None:
    """Return the first whole word that is yes or no, else None."""
    text = text.lower()
    if "yes" not in text and "no" not in text:  # cheaper than the search, and mostly so
        return None
    found = _YES_NO.search(text)
    return found.group(1) if found else None
