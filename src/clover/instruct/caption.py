"""Captions as people have them, made fit to be asked about and to be answered with.

In: any caption. Out: the cleaned text, or the reason why it is set aside.
"""

from __future__ import annotations

import functools
import html
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from clover.core.record import Record, Rejection, iterate_records
from clover.instruct.vocabulary import load_yaml

MAX_CHARACTERS = 8000
"""A longer caption is a document, not a caption; sending one by mistake costs real money."""

_TAG = re.compile(
    r"<(?:script|style)\b.*?</(?:script|style)>|</?[a-zA-Z][^<>]{0,200}>|<!--.*?-->", re.S
)
_URL = re.compile(r"\b(?:https?://|www\.)\S+", re.I)
_BOX = re.compile(r"\[\s*\d?\.\d+(?:\s*,\s*\d?\.\d+){3}\s*\]\s*,?")
_MONTH = (
    "jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|"
    "sep(?:t(?:ember)?)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?"
)
_DATE = re.compile(
    rf"\b(?:\d{{1,2}}[./-]\d{{1,2}}[./-](?:19|20)?\d{{2}}|(?:19|20)\d{{2}}-\d{{2}}-\d{{2}}|"
    rf"(?:\d{{1,2}}(?:st|nd|rd|th)?\s+)?(?:{_MONTH})\.?,?\s+(?:\d{{1,2}}(?:st|nd|rd|th)?,?\s+)?"
    r"(?:19|20)\d{2}|(?:19|20)\d{2})\b",
    re.I,
)
_MAGNIFICATION = re.compile(
    r"(?:\(?\b(?:original\s+)?(?:at\s+)?(?:a\s+)?magnification\s*(?:of\b|:|=)?\s*)?"
    r"(?:(?<![\w.])[x×]\s?\d{1,4}(?:\.\d)?(?![\w%])|(?<![\w.])\d{1,4}(?:\.\d)?\s?[x×](?![\w]))\)?"
    r"|\b(?:micro(?:scopic)?\s+)?(?:very\s+)?(?:low|med(?:ium)?|mid|high|intermediate)[\s-]+"
    r"(?:mag(?:nification)?|power(?:\s+(?:view|field|magnification))?|pow)\b\.?"
    r"|\b(?:original\s+)?magnification\b",
    re.I,
)
_FIGURE = re.compile(
    r"\(?\b(?:see\s+)?(?:fig(?:ure)?s?\.?\s*\d+[a-z]?(?:\s*[-,&]\s*\d*[a-z]?)?|panel\s+[A-Z]\b|"
    r"plate\s+\d+|table\s+\d+)\s*\)?[.:,]?\s*",
    re.I,
)
_CHATTER = re.compile(
    r"\b(?:(?:very|quite|pretty)\s+)?(?:good|nice|excellent|outstanding|great|beautiful|poor)\s+"
    r"(?:slide|photo(?:graph)?|picture|shot|example(?:\s+of)?)\b|\bsource\s?\?"
    r"|\b(?:same as in|see also|see caption)(?:\s+(?:in\s+)?slide)?\b.*$"
    r"|\bcase\s+\d+\b"
    r"|\bMicro\b(?=\s+(?:H&E|GMS|PAS|low|med|high|[A-Z])|\s*$)",
    re.I,
)
_ARROWS = re.compile(
    r"\s*\(\s*(?:arrow(?:head)?s?|asterisks?)\s*\)|\s*\b(?:arrow(?:head)?s?|asterisks?)\b", re.I
)


@dataclass
class Captions:
    """A pass over a caption file: iterate it; `rejected` fills as the pass goes on."""

    path: Path
    any_language: bool = False
    limit: int | None = None
    rejected: list[Rejection] = field(default_factory=list)

    def __iter__(self) -> Iterator[Record]:
        """Yield the usable records with their captions as plain text, one at a time."""
        self.rejected.clear()
        count = 0
        for item in iterate_records(self.path, needs="caption"):
            if isinstance(item, Rejection):
                self._set_aside(item)
                continue
            reason = problem(item.caption or "", any_language=self.any_language)
            if reason is not None:
                content = {"id": item.id, "caption": (item.caption or "")[:200]}
                self._set_aside(Rejection(str(self.path), count, reason, content))
                continue
            yield item.model_copy(update={"caption": plain_text(item.caption or "")})
            count += 1
            if self.limit is not None and count >= self.limit:
                return

    def _set_aside(self, item: Rejection) -> None:
        content = item.content
        if isinstance(content, dict):
            content = {key: str(value)[:200] for key, value in content.items()}
        self.rejected.append(Rejection(item.source, item.line, item.reason, content))


def problem(caption: str, *, any_language: bool = False) -> str | None:
    """Return why a caption cannot be used, or None."""
    if len(caption) > MAX_CHARACTERS:
        return f"caption longer than {MAX_CHARACTERS:,} characters"
    text = plain_text(caption)
    if text.lower() in {"", "nan", "none", "null", "n/a", "na", "-", "."}:
        return "empty caption"
    if not any(character.isalpha() for character in text):
        return "caption without a word"
    if not any_language and not is_english(text):
        return "not in English"
    return None


def plain_text(caption: str) -> str:
    """Return a caption without markup, control characters and emoji, on one line."""
    text = caption
    for _ in range(2):  # entities may hide tags: &lt;b&gt;
        text = _TAG.sub(" ", html.unescape(text))
    text = unicodedata.normalize("NFC", text)
    kept = (
        " " if unicodedata.category(c) in {"Cc", "Zl", "Zp", "Cf"} else c
        for c in text
        if unicodedata.category(c) not in {"So", "Sk", "Cs", "Co", "Cn"} and c not in "\ufe0f\u20e3"
    )
    return " ".join("".join(kept).split())


def is_english(text: str) -> bool:
    """Say whether a text reads as English; a terse one in Latin script counts as English."""
    if not text.isascii():
        letters = [c for c in text if c.isalpha()]
        # Greek letters are ordinary in English pathology (TGF-β), whole words of them are not.
        foreign = sum("LATIN" not in unicodedata.name(c, "") for c in letters)
        if foreign > 0.3 * len(letters):
            return False
    tokens = re.findall(r"[^\W\d_]+", text.lower())
    hits = {name: sum(t in stop for t in tokens) for name, stop in _stop_words().items()}
    english = hits.pop("english")
    most = max(hits.values())
    return not (most >= 3 and most > english * 1.5)


@functools.cache
def _stop_words() -> dict[str, frozenset[str]]:
    languages = load_yaml("dictionary/language")["languages"]
    return {name: frozenset(stop) for name, stop in languages.items()}


def clean(caption: str) -> str:
    """Return a caption as an answer: no dates, magnifications, figure references or chatter."""
    text = plain_text(caption)
    for pattern in (_URL, _BOX, _FIGURE, _MAGNIFICATION, _DATE, _CHATTER, _ARROWS):
        text = pattern.sub(" ", text)
    text = re.sub(r"\(\s*[,;.]?\s*\)|\[\s*\]", " ", text)
    text = re.sub(r"\s+([,.;:!?)])", r"\1", " ".join(text.split()))
    text = re.sub(r"([,;:])(?:\s*[,;:])+", r"\1", text)
    text = text.strip(" ,;:-–")
    text = _calm_capitals(text)
    if not text:
        return ""
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".!?" else text + "."


def _calm_capitals(text: str) -> str:
    """Put a heading in capitals ("BREAST: ...") into sentence case; keep acronyms."""

    def calm(match: re.Match[str]) -> str:
        return match.group().lower()

    # A heading ends in a colon and holds no small letter; elsewhere only long words are no acronym.
    return re.sub(r"\b[A-Z]{6,}\b|\b[A-Z]{4,}\b(?=[^a-z:]{0,40}:)|^[A-Z]{4,}\b(?=,)", calm, text)


def has_date(text: str) -> bool:
    """Say whether a text names a date or a year."""
    return bool(_DATE.search(text))


def has_magnification(text: str) -> bool:
    """Say whether a text names a magnification."""
    return bool(_MAGNIFICATION.search(text))
