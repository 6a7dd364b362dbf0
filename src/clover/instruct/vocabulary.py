"""The word lists of this room: organs, stains, findings, negations, and how they match a text.

In: YAML under `dictionary/`. Out: which terms a text states, and which of them it denies.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parent
DICTIONARIES = ("body_parts", "stains", "findings", "diagnoses")


def _pattern(variants: Iterable[str]) -> str:
    """Return a regex of whole words, the longest first; spaces match any white space."""
    words = sorted(set(variants), key=lambda word: (-len(word), word))
    body = "|".join(re.escape(word).replace(r"\ ", r"\s+") for word in words)
    return rf"(?<![\w-])(?:{body})"


@functools.cache
def load_yaml(name: str) -> Any:
    """Return one of this room's YAML files, by its path without the ending."""
    # The C loader is as safe and nine times as fast; every command reads these lists.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"), Loader=loader)


@dataclass(frozen=True)
class Mention:
    """A term that a text names.

    `start` and `end` are character positions; `denied` says that the text denies it.
    """

    term: str
    start: int
    end: int
    denied: bool


class Dictionary:
    """Terms with their variants, matched as whole words, longest first, plurals included.

    Args:
        terms: Term to variants.
        names: Longer names in which a variant is no mention: cystic fibrosis is no fibrosis.
    """

    def __init__(self, terms: dict[str, list[str]], *, names: Iterable[str] = ()) -> None:
        self.terms = list(terms)
        self._other_names = re.compile(_pattern(names), re.IGNORECASE) if names else None
        self._names = {
            re.sub(r"\s+", " ", variant.lower()): term
            for term, variants in terms.items()
            for variant in variants
        }
        # Short acronyms (PAS, DAB, lip) must not match inside ordinary words in another case.
        self._regex = re.compile(_pattern(self._names) + r"(?:es|s)?(?![\w])", re.IGNORECASE)

    def _term(self, found: str) -> str:
        key = re.sub(r"\s+", " ", found.lower())
        for form in (key, key.removesuffix("s"), key.removesuffix("es")):
            if form in self._names:
                return self._names[form]
        raise AssertionError(found)

    def mentions(self, text: str) -> list[Mention]:
        """Return every mention in the order of the text."""
        return [
            Mention(self._term(m.group()), m.start(), m.end(), is_denied(text, m.start(), m.end()))
            for m in self._regex.finditer(self._blanked(text))
        ]

    def _blanked(self, text: str) -> str:
        """Return a text of the same length without the names that merely hold a term."""
        if self._other_names is None:
            return text
        return self._other_names.sub(lambda match: "_" * len(match.group()), text)

    def stated(self, text: str) -> list[str]:
        """Return the terms that a text affirms at least once, each once, in order."""
        return list(dict.fromkeys(m.term for m in self.mentions(text) if not m.denied))

    def denied(self, text: str) -> list[str]:
        """Return the terms that a text names only to deny them."""
        found = self.mentions(text)
        affirmed = {m.term for m in found if not m.denied}
        return list(dict.fromkeys(m.term for m in found if m.term not in affirmed))


@functools.cache
def dictionary(name: str) -> Dictionary:
    """Return one of `DICTIONARIES`."""
    names = load_yaml("dictionary/language")["names"] if name == "findings" else ()
    return Dictionary(load_yaml(f"dictionary/{name}"), names=names)


@functools.cache
def words(name: str) -> re.Pattern[str]:
    """Return a list of `dictionary/language.yaml` as one regex of whole words."""
    return phrase_pattern(load_yaml("dictionary/language")[name])


def phrase_pattern(variants: Iterable[str]) -> re.Pattern[str]:
    """Return words and phrases as one regex of whole words, in any case."""
    return re.compile(_pattern(variants) + r"(?!\w)", re.IGNORECASE)


_SENTENCE = re.compile(r"[.;!?\n:]")
_REACH = 60


@functools.cache
def _negation() -> re.Pattern[str]:
    variants = [word for word in load_yaml("dictionary/language")["negations"] if word != "n't"]
    return re.compile(rf"{_pattern(variants)}(?!\w)|n['’]t\b", re.IGNORECASE)


def is_denied(text: str, start: int, end: int) -> bool:
    """Say whether the words at `start:end` are negated within their clause.

    Looks back to the clause's start for "no", "without", ... and forward for "is absent", ...
    """
    before = _SENTENCE.split(text[max(0, start - _REACH) : start])[-1]
    boundaries = list(words("boundaries").finditer(before))
    clause = before[boundaries[-1].end() :] if boundaries else before
    if _negation().search(clause):
        return True
    after = _SENTENCE.split(text[end : end + _REACH])[0]
    # "prominent nucleoli, and follicles are absent": a new clause begins at the comma.
    after = re.split(r",\s+and\b", after)[0]
    boundary = words("boundaries").search(after)
    return bool(words("negations_after").search(after[: boundary.start()] if boundary else after))


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
