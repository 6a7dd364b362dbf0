"""The word lists of this room: organs, stains, findings, and how they match a text.

In: YAML under `dictionary/`. Out: which terms a text states, denies, or leaves open.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

from clover.instruct.lists import load_yaml, word_pattern
from clover.instruct.standing import Standing, standing

DICTIONARIES = ("body_parts", "stains", "findings", "diagnoses")


@dataclass(frozen=True)
class Mention:
    """A term that a text names.

    `start` and `end` are character positions; `standing` is how the text stands to it.
    """

    term: str
    start: int
    end: int
    standing: Standing


class Dictionary:
    """Terms with their variants, matched as whole words, longest first, plurals included.

    Args:
        terms: Term to variants.
        names: Longer names in which a variant is no mention: cystic fibrosis is no fibrosis.
    """

    def __init__(self, terms: dict[str, list[str]], *, names: Iterable[str] = ()) -> None:
        self.terms = list(terms)
        self._other_names = re.compile(word_pattern(names), re.IGNORECASE) if names else None
        self._names = {
            re.sub(r"\s+", " ", variant.lower()): term
            for term, variants in terms.items()
            for variant in variants
        }
        # Short acronyms (PAS, DAB, lip) must not match inside ordinary words in another case.
        self._regex = re.compile(word_pattern(self._names) + r"(?:es|s)?(?![\w])", re.IGNORECASE)

    def _term(self, found: str) -> str:
        key = re.sub(r"\s+", " ", found.lower())
        for form in (key, key.removesuffix("s"), key.removesuffix("es")):
            if form in self._names:
                return self._names[form]
        raise AssertionError(found)

    def mentions(self, text: str) -> list[Mention]:
        """Return every mention in the order of the text."""
        return [
            Mention(self._term(m.group()), m.start(), m.end(), standing(text, *m.span()))
            for m in self._regex.finditer(self._blanked(text))
        ]

    def _blanked(self, text: str) -> str:
        """Return a text of the same length without the names that merely hold a term."""
        if self._other_names is None:
            return text
        return self._other_names.sub(lambda match: "_" * len(match.group()), text)

    def stated(self, text: str) -> list[str]:
        """Return the terms that a text affirms at least once, each once, in order."""
        return self.standings(text)["stated"]

    def denied(self, text: str) -> list[str]:
        """Return the terms that a text names only to deny them."""
        return self.standings(text)["denied"]

    def standings(self, text: str) -> dict[Standing, list[str]]:
        """Return each term that a text names once, in order, under how the text stands to it.

        A term that is stated anywhere is stated; one that is denied here and open there is open.
        """
        found: dict[str, set[Standing]] = {}
        for mention in self.mentions(text):
            found.setdefault(mention.term, set()).add(mention.standing)
        sorted_by: dict[Standing, list[str]] = {"stated": [], "open": [], "denied": []}
        for term, standings in found.items():
            strongest = next(name for name in sorted_by if name in standings)
            sorted_by[strongest].append(term)
        return sorted_by


@functools.cache
def dictionary(name: str) -> Dictionary:
    """Return one of `DICTIONARIES`."""
    names = load_yaml("dictionary/language")["names"] if name == "findings" else ()
    return Dictionary(load_yaml(f"dictionary/{name}"), names=names)


_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


@functools.cache
def _canonical() -> dict[str, str]:
    table: dict[str, str] = {}
    for group in load_yaml("dictionary/language")["synonyms"]:
        for word in group:
            table[word] = group[0]
    for name in DICTIONARIES:
        for term, variants in load_yaml(f"dictionary/{name}").items():
            for variant in variants:
                if " " not in variant:
                    table.setdefault(variant.lower(), term)
    return table


def stem(word: str) -> str:
    """Return a crude stem: British and American spelling, plural and verb endings fall together."""
    word = word.lower().replace("’", "'").removesuffix("'s")
    for ending in ("", "s", "d", "ed", "ing"):
        known = _canonical().get(word.removesuffix(ending)) if word.endswith(ending) else None
        if known is not None:
            return known
    word = word.replace("aem", "em").replace("oed", "ed").replace("our", "or")
    for ending in ("ization", "isation", "ations", "ation", "ingly", "ing", "edly", "ised", "ized"):
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word[: -len(ending)]
    for ending in ("ies", "ied", "ed", "es", "ly", "al", "ic", "s", "e", "y"):
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word[: -len(ending)]
    return word


@functools.cache
def _empty_stems() -> frozenset[str]:
    language = load_yaml("dictionary/language")
    functional = (
        "a an the and or of in on at to from by for with as is are was were be been being has have "
        "had do does did it its they them their there here this that these those which what who "
        "whose where when how why not no yes than then so very more most less least also can could "
        "would should will all any each every out up down over under if but while into such due "
        "we you i our your my he she his her himself itself"
    )
    return frozenset(stem(word) for word in [*functional.split(), *language["neutral"]])


def content_stems(text: str) -> list[str]:
    """Return the stems of the words that say something about the tissue, in order."""
    empty = _empty_stems()
    parts = (part for word in _WORD.findall(text) for part in word.split("-"))
    stems = (stem(part) for part in parts if len(part) > 1)
    return [found for found in stems if found not in empty]
