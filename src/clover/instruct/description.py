"""A caption as the description of an image: without an atlas's headings, remarks and histories.

In: any caption. Out: what it says of the image. Atlases file a picture under its organ system
("CARDIOVASCULAR: HEART: ...") and note down how good the slide is and who the patient was; none of
that can be seen, and a model that learns it learns to talk about slide boxes.
"""

from __future__ import annotations

import functools
import re

from clover.instruct.caption import clean, plain_text
from clover.instruct.lists import load_yaml
from clover.instruct.vocabulary import dictionary, stem

_VERBS = "shows?|showed|showing|demonstrat\\w+|contain\\w*|reveal\\w*|is|are|was|were|has|have"
_SENTENCE_START = re.compile(r"(?<=[a-z)]{2}\. )[a-z]")
_HEADING = re.compile(r"\s*([A-Za-z][A-Za-z /&-]{1,40}):(?:\s+|$)")


def describe(caption: str) -> str:
    """Return a caption as an answer to "what does this image show?"; may be empty."""
    headings, rest = _filed(plain_text(caption))
    kept = [item.capitalize() for item in headings if item.lower() not in _systems()][:1]
    text = _without_histories(rest)
    text = clean(_without_remarks(text) if headings else text)
    if kept and not _opens_with(text, kept[0]):
        text = f"{kept[0]}: {text}" if text else kept[0]
    # A stain in the midst of a line was set apart by the magnification that is gone.
    text = _SENTENCE_START.sub(lambda m: m[0].upper(), _set_stain_apart(text))
    return clean(text) or clean(caption)


def _filed(text: str) -> tuple[list[str], str]:
    """Return the headings that a caption opens with, and what stands under them.

    A heading is in capitals, or names an organ system; what only looks like one stays.
    """
    found: list[str] = []
    match = _HEADING.match(text)
    while match and (match[1].isupper() or match[1].lower() in _systems()):
        found.append(match[1])
        text = text[match.end() :]
        match = _HEADING.match(text)
    return found, text


def _opens_with(text: str, heading: str) -> bool:
    """Say whether a text names in its first part what its heading names: "HEART: Heart, ..."."""
    first = re.split(r"[:,.]", text)[0]
    return {stem(word) for word in heading.split()} <= {stem(word) for word in first.split()}


def _without_histories(text: str) -> str:
    """Leave out what is told of the patient, and nothing of what the tissue then shows."""
    text = _pattern("histories", rf"[^,.;:]*?(?=\s+(?:{_VERBS})\b|[,.;:]|$)").sub("", text)
    return _pattern("ages", "").sub("", text)


def _without_remarks(text: str) -> str:
    """Leave out an atlas's remarks on its slides."""
    text = _pattern("remarks_to_the_end", ".*").sub("", text)
    return _pattern("remarks", "").sub(_gap, text)


def _gap(remark: re.Match[str]) -> str:
    """Return what to put in a remark's place: "invasion typical carcinoma" says two things."""
    before = remark.string[: remark.start()].split()
    is_apart = not before or before[-1][-1] in ".,:;(" or before[-1].lower() in _joints()
    return " " if is_apart else ", "


def _set_stain_apart(text: str) -> str:
    for mention in reversed(dictionary("stains").mentions(text)):
        before, after = text[: mention.start], text[mention.end :]
        if before.rstrip().endswith(":") and re.match(r" (?!stain)[a-z]", after):
            text = f"{before}{text[mention.start : mention.end]},{after}"
    return text


@functools.cache
def _systems() -> frozenset[str]:
    return frozenset(load_yaml("dictionary/atlas")["systems"])


@functools.cache
def _joints() -> frozenset[str]:
    return frozenset(load_yaml("dictionary/language")["joints"])


@functools.cache
def _pattern(name: str, tail: str) -> re.Pattern[str]:
    """Return a list of regexes as one of whole words, with whatever follows up to `tail`."""
    body = "|".join(load_yaml("dictionary/atlas")[name])
    return re.compile(rf"[\s,]*(?<!\w)(?:{body})(?!\w){tail}", re.IGNORECASE | re.DOTALL)
