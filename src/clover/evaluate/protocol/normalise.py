"""Two ways of making two texts comparable: the published VQA normaliser, and the strict one.

The VQA normaliser is kept with all its oddities (METRICS, section 1.1), because published numbers
depend on them. The strict one is what SQuAD does.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable
from functools import lru_cache, wraps
from importlib.resources import files
from typing import Any, TypeVar

import yaml

_LONGEST_CACHED = 64
_MOST_CACHED = 1 << 16
"""Words repeat, so their normal forms are kept; essays without a space would fill the memory."""


LONGEST_REMEMBERED = 1000
_MOST_REMEMBERED = 1 << 12

Result = TypeVar("Result")


def remembered(function: Callable[[str], Result]) -> Callable[[str], Result]:
    """Remember what came of the last texts; several rules ask for the same, a chunk apart.

    Essays are not remembered: four thousand of them would fill the memory.
    """
    kept = lru_cache(maxsize=_MOST_REMEMBERED)(function)

    @wraps(function)
    def found(text: str) -> Result:
        return kept(text) if len(text) <= LONGEST_REMEMBERED else function(text)

    return found


class _Forms(dict[str, str]):
    """Raw word -> its normal form, filled as words come."""

    def __missing__(self, raw: str) -> str:
        word = self._form(raw)
        if len(raw) <= _LONGEST_CACHED:
            if len(self) >= _MOST_CACHED:
                self.clear()
            self[raw] = word
        return word

    def _form(self, raw: str) -> str:
        raise NotImplementedError


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
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_BESIDE_A_SPACE = re.compile(rf"[{re.escape(_MARKS)}](?:(?= )|(?<= .))")
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32


def vqa_normalise(text: str) -> str:
    """Return the normal form of an already lower-cased text.

    Punctuation becomes a space, or vanishes if any such mark stands beside a space (each mark
    for itself) or a comma stands between digits (all marks); at most 32 full stops vanish.

    Source: METRICS, section 1.1.
    """
    if "," in text and _DIGIT_COMMA_DIGIT.search(text) is not None:
        vanishing = _EVERY_MARK
    else:
        vanishing = frozenset(_BESIDE_A_SPACE.findall(text))
    if text.count(".") > _MOST_PERIODS:
        return _vqa_form(text, _translation(vanishing))
    # No rule but these two looks beyond a word, so that words can be remembered.
    return " ".join(filter(None, map(_vqa_forms(vanishing).__getitem__, text.split())))


_EVERY_MARK = frozenset(_MARKS)


@lru_cache(maxsize=1 << 8)
def _translation(vanishing: frozenset[str]) -> dict[int, str]:
    """Return what becomes of each mark: nothing, or a space."""
    return {ord(mark): "" if mark in vanishing else " " for mark in _MARKS}


def _vqa_form(text: str, marks: dict[int, str]) -> str:
    """Return the normal form of a text, given what becomes of its marks."""
    bare = _PERIOD.sub("", text.translate(marks), count=_MOST_PERIODS)
    words = bare.split()
    return " ".join(filter(None, map(_SPECIAL.get, words, words)))


class _VqaForms(_Forms):
    """Word of a text whose vanishing marks are known -> the word or words it becomes."""

    def __init__(self, vanishing: frozenset[str]) -> None:
        super().__init__()
        self._marks = _translation(vanishing)

    def _form(self, raw: str) -> str:
        return _vqa_form(raw, self._marks)


@lru_cache(maxsize=16)  # texts differ little in which marks stand beside a space
def _vqa_forms(vanishing: frozenset[str]) -> _VqaForms:
    return _VqaForms(vanishing)


_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)


class _StrictWords(_Forms):
    """Raw word -> lower-case word without punctuation."""

    def __init__(self, left_out: frozenset[str]) -> None:
        super().__init__()
        self._left_out = left_out

    def _form(self, raw: str) -> str:
        word = raw.lower()
        if not word.isascii():
            composed = unicodedata.normalize("NFC", word)
            word = "".join(mark for mark in composed if unicodedata.category(mark)[0] != "P")
        word = word.translate(_ASCII_PUNCTUATION)
        return "" if word in self._left_out else word


_WORDS = _StrictWords(_ARTICLES)
_WORDS_WITH_ARTICLES = _StrictWords(frozenset())


@remembered
def strict_words(text: str) -> list[str]:
    """Return lower-case words without punctuation and articles, as SQuAD does.

    Where only articles are left they stay: "A" is an answer too. Unicode punctuation goes with
    the rest, and accents are composed. The list is remembered: read it, do not change it.
    """
    raw = text.split()
    return list(filter(None, map(_WORDS.__getitem__, raw))) or list(
        filter(None, map(_WORDS_WITH_ARTICLES.__getitem__, raw))
    )


# What stands before is looked at last: a pattern that begins with a letter is found twice as fast.
_YES_NO = re.compile(r"(?:yes(?<![^\W_]yes)|no(?<![^\W_]no))(?![^\W_])")


@remembered
def first_yes_no(text: str) -> str | None:
    """Return the first whole word that is yes or no, else None."""
    text = text.lower()
    if "yes" not in text and "no" not in text:  # cheaper than the search, and mostly so
        return None
    found = _YES_NO.search(text)
    return found.group() if found else None
