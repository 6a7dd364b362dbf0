"""The filter: named rules, each counted, each reversible.

In: question and answer records, and the captions they were made from. Out: the good ones, and for
each other one a `Rejection` whose reason opens with the rule's name and whose content is the whole
record, so that it can be taken back.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from clover.core.record import Record, Rejection
from clover.instruct import support
from clover.instruct.caption import has_date, has_magnification
from clover.instruct.duplicates import NearDuplicates
from clover.instruct.lists import words
from clover.instruct.mismatch import mismatch
from clover.instruct.parse import answer_type
from clover.instruct.vocabulary import content_stems

QUESTION_WORDS = (3, 60)
ANSWER_WORDS = (1, 250)
NEAR_DUPLICATE = 0.8
"""Jaccard similarity of two pairs about one image from which they count as the same."""

# Made from known truth or by people: the caption need not say it.
_TRUSTED = {"truth", "human"}
_CUT = re.compile(
    r"(?:\b(?:and|or|the|a|an|of|with|in|to|by|for|is|are|which|that|from|as|its)|,)\s*$", re.I
)
_IMAGE = re.compile(r"\bin the (?:above )?image\b", re.I)
_ARTICLES = {"a", "an", "the", "of", "is", "are", "was", "were", "it", "its", "this", "that", "to"}
_LABEL = re.compile(r"\b(?:question|answer)\s*\d*\s*:|\{\s*\"|```|</?\w+>|\\n", re.I)

Rule = Callable[[Record], str | None]


def filter_records(
    records: Iterable[Record],
    *,
    captions: Mapping[str, str | Sequence[str]] | None = None,
    reviewed: Mapping[str, str] | None = None,
    min_overlap: float = support.MIN_OVERLAP,
) -> tuple[list[Record], list[Rejection]]:
    """Keep the records that pass every rule.

    Args:
        records: Records with questions and answers. A record's own `caption` is what the answer
            is checked against; without one, and without an entry in `captions`, only the rules
            that need no caption are applied.
        captions: Image to its caption, or to several of which one must bear the answer out, for
            records that carry none.
        min_overlap: Share of an answer's telling words that must stand in the caption; lower it
            for answers that explain more than the caption says.
        reviewed: Record id to "keep" or "reject", from a review by hand; it overrules the rules.

    Returns:
        The good records, and a rejection each for the others.
    """
    kept: list[Record] = []
    rejected: list[Rejection] = []
    known = NearDuplicates(NEAR_DUPLICATE)
    for number, record in enumerate(records, start=1):
        verdict = (reviewed or {}).get(record.id)
        known_captions = record.caption or (captions or {}).get(record.image or "", ())
        if isinstance(known_captions, str):
            known_captions = [known_captions]
        reason = None if verdict == "keep" else _reason(record, known_captions, min_overlap)
        if verdict == "reject":
            reason = "review: rejected by hand"
        if reason is None and verdict != "keep":
            reason = _duplicate(record, known)
        if reason is None:
            kept.append(record)
        else:
            rejected.append(Rejection(record.source or "", number, reason, record.row()))
    return kept, rejected


def rule_counts(rejected: Iterable[Rejection]) -> Counter[str]:
    """Return how many records each rule turned away."""
    return Counter(item.reason.split(":")[0] for item in rejected)


def captions_by_image(items: Iterable[Record | Rejection]) -> dict[str, list[str]]:
    """Return every caption of each image, in order: an image may have several."""
    found: dict[str, list[str]] = {}
    for item in items:
        if isinstance(item, Record) and item.image and item.caption:
            found.setdefault(item.image, []).append(item.caption)
    return found


def _reason(record: Record, captions: Sequence[str], min_overlap: float) -> str | None:
    for rule in RULES:
        reason = rule(record)
        if reason is not None:
            return reason
    if record.origin in _TRUSTED:
        return None
    span = getattr(record, "support", None)
    faults = []
    for caption in captions:
        found = support.fault(
            record.question or "",
            record.answer or "",
            caption,
            support=span,
            min_overlap=min_overlap,
        )
        if found is None:
            return None
        faults.append(found)
    return faults[0] if faults else None


def _unparseable(record: Record) -> str | None:
    question, answer = (record.question or "").strip(), (record.answer or "").strip()
    if not question or not answer:
        return "unparseable: empty question or answer"
    for text in (question, answer):
        if _LABEL.search(text):
            return "unparseable: markup or labels are left in the text"
    if not any(c.isalpha() for c in question) or not any(c.isalnum() for c in answer):
        return "unparseable: no words"
    if _CUT.search(answer) or _is_open(answer):
        return "unparseable: the answer is cut off"
    if _is_open(question) or len(_IMAGE.findall(question)) > 1:
        return "unparseable: the question is no sentence"
    return None


def _is_open(text: str) -> bool:
    return text.count("(") != text.count(")") or text.count('"') % 2 == 1


def _length(record: Record) -> str | None:
    for name, text, (least, most) in (
        ("question", record.question, QUESTION_WORDS),
        ("answer", record.answer, ANSWER_WORDS),
    ):
        count = len((text or "").split())
        if not least <= count <= most:
            return f"length: {name} of {count} words, allowed {least} to {most}"
    question, answer = (_flat(text or "") for text in (record.question, record.answer))
    if question == answer:
        return "length: the answer repeats the question"
    return None


def _flat(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _word_rule(name: str, *, in_question: bool) -> Rule:
    def rule(record: Record) -> str | None:
        text = f"{record.question or ''} \n {record.answer or ''}" if in_question else record.answer
        match = words(name).search(text or "")
        return f"{name}: '{match.group().lower()}'" if match else None

    return rule


def _date_or_magnification(record: Record) -> str | None:
    text = f"{record.question or ''} \n {record.answer or ''}"
    if has_date(text):
        return "date: a date or a year"
    return "magnification: names a magnification" if has_magnification(text) else None


def _general(record: Record) -> str | None:
    match = words("general").search(record.question or "")
    return f"general: '{match.group().lower()}' asks a textbook" if match else None


def _repetition(record: Record) -> str | None:
    """Small models run in circles."""
    tokens = _flat(record.answer or "").split()
    runs = Counter(zip(*(tokens[offset:] for offset in range(3)), strict=False))
    most = max(runs.values(), default=0)
    # Three words that make up two fifths of the answer; a diagnosis named three times does not.
    if most >= 3 and 3 * most >= 0.4 * len(tokens):
        return "repetition: the answer says the same again and again"
    return None


def _empty_answer(record: Record) -> str | None:
    """Find an answer that says nothing, or not what is asked."""
    question, answer = record.question or "", record.answer or ""
    stems = set(content_stems(answer))
    if not stems or answer_type(answer) == "closed" or answer.lower().startswith(("yes", "no")):
        return None
    if not set(_flat(answer).split()) - set(_flat(question).split()) - _ARTICLES:
        return "echo: the answer says no more than the question"
    return mismatch(question, answer)


RULES: tuple[Rule, ...] = (
    _unparseable,
    _length,
    _repetition,
    _general,
    _word_rule("nonanswer", in_question=False),
    _word_rule("leakage", in_question=True),
    _date_or_magnification,
    _word_rule("advice", in_question=True),
    _word_rule("overconfident", in_question=False),
    _empty_answer,
)


def _duplicate(record: Record, known: NearDuplicates) -> str | None:
    """Find an earlier pair about the same image that asks and says the same."""
    answer = (record.answer or "").strip().lower().rstrip(".!")
    stems = {*content_stems(record.question or ""), *(f"={s}" for s in content_stems(answer))}
    if answer in ("yes", "no"):
        stems.add(f"={answer}")
    elif not stems:
        stems = set(_flat(f"{record.question} {answer}").split())
    scope = record.image or record.group or record.id
    if known.find_or_add(frozenset(stems), scope=scope):
        return "duplicate: an earlier pair about this image asks and says the same"
    return None
