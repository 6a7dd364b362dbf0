"""Captions as people have them, made fit to be asked about and to be answered with.

In: any caption. Out: the cleaned text, or the reason why it is set aside.
"""

from __future__ import annotations

import functools
import html
import itertools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from clover.core.files import write_jsonl
from clover.core.image_names import Move, image_move
from clover.core.record import Record, Rejection, numbered_records
from clover.core.tally import Tally
from clover.instruct.lists import load_yaml

MAX_CHARACTERS = 8000
"""A longer caption is a document, not a caption; sending one by mistake costs real money."""

_WORD = re.compile(r"[^\W\d_]+")
_TAG = re.compile(
    r"<(?:script|style)\b.*?</(?:script|style)>|</?[a-zA-Z][^<>]{0,200}>|<!--.*?-->", re.S
)
_URL = re.compile(r"\b(?:https?://|www\.)\S+", re.I)
_BOX = re.compile(r"\[\s*\d?\.\d+(?:\s*,\s*\d?\.\d+){3}\s*\]\s*,?")
_MONTH = (
    "jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|"
    "sep(?:t(?:ember)?)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?"
)
_YEAR = r"(?:19|20)\d{2}"
# So a sentence goes on after a year; after a number it goes on with what is counted.
_ON = (
    r"(?=\s*(?:$|[.,;:)\]])|\s+(?:the|an?|this|that|it|he|she|is|are|was|were|with|at|by|from|in|on|"
    r"for|and|but|when|after|before|because|shows?|showed|showing)\b)"
)
_DATE = re.compile(
    rf"\b(?:\d{{1,2}}[./-]\d{{1,2}}[./-](?:19|20)?\d{{2}}|{_YEAR}-\d{{2}}-\d{{2}}|"
    rf"(?:\d{{1,2}}(?:st|nd|rd|th)?\s+)?(?:{_MONTH})\.?,?\s+(?:\d{{1,2}}(?:st|nd|rd|th)?,?\s+)?"
    rf"{_YEAR})\b|\({_YEAR}\)|"
    # A number alone is a year only after one of these words, and counts nothing: "in 2000 cells".
    r"\b(?:in|since|from|during|until|between|before|after|dated|circa|year)\s+"
    rf"{_YEAR}(?:\s*(?:[-–]|to|and)\s*{_YEAR})?\b{_ON}",
    re.I,
)
_NUMBER = r"(?<![\w.,])\d+(?:[.,]\d+)?"
_UNIT = r"\s?(?:mm|cm|[µμu]m|nm|microns?|micromet(?:er|re)s?|(?:centi|milli)met(?:er|re)s?)\b"
_SIZE = (
    rf"{_NUMBER}(?:{_UNIT})?(?:(?:\s[x×]\s|[x×])\d+(?:[.,]\d+)?(?:{_UNIT})?)+(?!\w)"
    rf"|{_NUMBER}(?:\s?[x×]\s?\d+(?:[.,]\d+)?)+{_UNIT}"
)
_MAGNIFICATION = re.compile(
    rf"(?P<size>{_SIZE})|"
    r"(?:\(?\b(?:original\s+)?(?:at\s+)?(?:a\s+)?magnification\s*(?:of\b|:|=)?\s*)?"
    rf"(?:(?<![\w.])[x×]\s?\d{{1,4}}(?:\.\d)?(?![\w%])(?!{_UNIT})|"
    r"(?<![\w.])\d{1,4}(?:\.\d)?\s?[x×](?![\w]))\)?"
    r"|\b(?:micro(?:scopic)?\s+)?(?:very\s+)?(?:low|med(?:ium)?|mid|high|intermediate)[\s-]+"
    r"(?:mag(?:nification)?|power(?:\s+(?:view|field|magnification))?|pow)\b\.?"
    r"|\b(?:original\s+)?magnification\b",
    re.I,
)
"""Magnifications, and sizes in the group "size": "2 x 3 cm" is none."""
_MEASURE = re.compile(rf"(?P<size>{_SIZE})|{_NUMBER}{_UNIT}", re.I)
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
    """A caption file of any size: iterate it, as often as you like; `reasons` counts as you go."""

    path: Path
    any_language: bool = False
    limit: int | None = None
    is_clean: bool = False
    """The captions were cleaned before; they are taken as they stand."""
    out: Path | None = None
    """A file whose folder the images are named from, by `core/image_names.py`."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why captions were set aside, of the last pass."""

    def __iter__(self) -> Iterator[Record]:
        """Yield the usable records with their captions as plain text, one at a time."""
        self.reasons.clear()
        move = self._move
        for item in self._items():
            if isinstance(item, Record):
                yield item if move is None else move(item)
            else:
                self.reasons[item.reason] += 1

    @functools.cached_property
    def _move(self) -> Move | None:
        if self.out is None:
            return None
        # As they stand: cleaning is most of a pass, and has no bearing on where images lie.
        items = (item for _, item in numbered_records(Path(self.path), "caption"))
        records = (item for item in items if isinstance(item, Record))
        return image_move(records, source=Path(self.path), out=self.out)

    @property
    def num_rejected(self) -> int:
        """How many captions the last pass set aside."""
        return self.reasons.total()

    def write_rejected(self, path: str | Path) -> None:
        """Write what the last pass set aside; nothing is written when that is nothing."""
        if self.num_rejected:
            # Read once more rather than kept: they may be most of a million.
            rejected = (item for item in self._items() if isinstance(item, Rejection))
            write_jsonl(path, (_shortened(item).row() for item in rejected))

    def _items(self) -> Iterator[Record | Rejection]:
        count = 0
        ids = Tally()
        for line, item in numbered_records(Path(self.path), "caption"):
            if not self.is_clean and isinstance(item, Record):
                item = self._cleaned(item, line)
            yield _told_apart(item, ids) if isinstance(item, Record) else item
            count += isinstance(item, Record)
            if self.limit is not None and count >= self.limit:
                return

    def _cleaned(self, item: Record, line: int) -> Record | Rejection:
        raw = item.caption or ""
        text = plain_text(raw) if len(raw) <= MAX_CHARACTERS else raw
        reason = problem(raw, text=text, any_language=self.any_language)
        if reason is not None:
            return Rejection(str(self.path), line, reason, {"id": item.id, "caption": raw})
        # A copy is dear, and most captions are plain already.
        return item if text == raw else item.model_copy(update={"caption": text})


def _told_apart(record: Record, ids: Tally) -> Record:
    """Return a record under an id that no record before it bears.

    A repeated one is numbered ("1", "1~2"), as a mix does: instructions are named by it.
    """
    if ids.is_new(record.id):
        return record
    numbered = (f"{record.id}~{number}" for number in itertools.count(2))
    return record.model_copy(update={"id": next(filter(ids.is_new, numbered))})


def _shortened(item: Rejection) -> Rejection:
    content = item.content
    if isinstance(content, dict):
        content = {key: str(value)[:200] for key, value in content.items()}
    return Rejection(item.source, item.line, item.reason, content)


def problem(caption: str, *, text: str | None = None, any_language: bool = False) -> str | None:
    """Return why a caption cannot be used, or None.

    Args:
        caption: As it stands in the file.
        text: Its `plain_text`, when that is known already.
        any_language: Let captions pass that do not read as English.
    """
    if len(caption) > MAX_CHARACTERS:
        return f"caption longer than {MAX_CHARACTERS:,} characters"
    text = plain_text(caption) if text is None else text
    if text.lower() in {"", "nan", "none", "null", "n/a", "na", "-", "."}:
        return "empty caption"
    if not any(character.isalpha() for character in text):
        return "caption without a word"
    if not any_language and not is_english(text):
        return "not in English"
    return None


class _Kept(dict[int, str]):
    """What each character becomes; a character is looked into once."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if category in {"Cc", "Zl", "Zp", "Cf"}:
            kept = " "
        elif category in {"So", "Sk", "Cs", "Co", "Cn"} or character in "\ufe0f\u20e3":
            kept = ""
        else:
            kept = character
        self[code] = kept
        return kept


_KEPT = _Kept()


def plain_text(caption: str) -> str:
    """Return a caption without markup, control characters and emoji, on one line."""
    text = caption
    for _ in range(2):  # entities may hide tags: &lt;b&gt;
        text = html.unescape(text)
        if "<" in text:
            text = _TAG.sub(" ", text)
    return " ".join(unicodedata.normalize("NFC", text).translate(_KEPT).split())


def is_english(text: str) -> bool:
    """Say whether a text reads as English; a terse one in Latin script counts as English."""
    if not text.isascii():
        letters = [c for c in text if c.isalpha()]
        # Greek letters are ordinary in English pathology (TGF-β), whole words of them are not.
        foreign = sum("LATIN" not in unicodedata.name(c, "") for c in letters)
        if foreign > 0.3 * len(letters):
            return False
    languages = _stop_words()
    hits = Counter(
        name for token in _WORD.findall(text.lower()) for name in languages.get(token, ())
    )
    english = hits.pop("english", 0)
    most = max(hits.values(), default=0)
    return not (most >= 3 and most > english * 1.5)


@functools.cache
def _stop_words() -> dict[str, tuple[str, ...]]:
    """Return the languages that each small word belongs to."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for name, words in load_yaml("dictionary/language")["languages"].items():
        for word in words:
            found[word].add(name)
    return {word: tuple(names) for word, names in found.items()}


def clean(caption: str) -> str:
    """Return a caption as an answer: no dates, magnifications, figure references or chatter."""
    text = plain_text(caption)
    for pattern in (_URL, _BOX, _FIGURE, _MAGNIFICATION, _DATE, _CHATTER, _ARROWS):
        text = pattern.sub(_gap, text)
    text = re.sub(r"\(\s*[,;.]?\s*\)|\[\s*\]", " ", text)
    text = re.sub(r"\s+([,.;:!?)])", r"\1", " ".join(text.split()))
    text = re.sub(r"([,;:])(?:\s*[,;:])+", r"\1", text)
    text = text.strip(" ,;:-–")
    text = _calm_capitals(text)
    if not text:
        return ""
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".!?" else text + "."


def _gap(match: re.Match[str]) -> str:
    """Return what stays where a pattern matched: a size, or nothing."""
    return match.groupdict().get("size") or " "


def _calm_capitals(text: str) -> str:
    """Put a heading in capitals ("BREAST: ...") into sentence case; keep acronyms."""

    def calm(match: re.Match[str]) -> str:
        return match.group().lower()

    # A heading ends in a colon and holds no small letter; elsewhere only long words are no acronym.
    return re.sub(r"\b[A-Z]{6,}\b|\b[A-Z]{4,}\b(?=[^a-z:]{0,40}:)|^[A-Z]{4,}\b(?=,)", calm, text)


def has_date(text: str) -> bool:
    """Say whether a text names a date or a year."""
    return bool(_DATE.search(text))


def lone_measures(text: str) -> set[str]:
    """Return the lengths that a text gives by themselves: of "2 x 3 cm, 5 mm" it is {"5mm"}."""
    found = (match for match in _MEASURE.finditer(text) if match["size"] is None)
    return {re.sub(r"\s", "", match.group()).lower() for match in found}


def has_magnification(text: str) -> bool:
    """Say whether a text names a magnification."""
    return any(match["size"] is None for match in _MAGNIFICATION.finditer(text))
