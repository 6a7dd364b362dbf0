"""A model's reply, read as question and answer pairs.

In: the text of a reply, in the published form, as JSON, or nearly so. Out: pairs. A pair that was
cut off is dropped, never completed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from clover.core.record import AnswerType

_FENCE = re.compile(r"^\s*```\w*\s*|\s*```\s*$")
_LABEL = re.compile(
    r"^[\s>*#_`-]*(?:\d+\s*[.):]\s*)?[*_]*\"?(?P<label>question|answer|user|assistant|q|a)\"?\s*\d*[*_]*"
    r"\s*[:=][*_]*\s*(?P<rest>.*)$",
    re.IGNORECASE,
)
_QUOTES = "\"'“”‘’«»"
_YES_NO = re.compile(r"^\s*(yes|no)\s*[.!]?\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class Pair:
    """One question with its answer."""

    question: str
    answer: str
    answer_type: AnswerType
    support: str | None = None
    """The words of the caption that the answer rests on, when the model was asked for them."""


def parse_pairs(reply: str, *, is_cut_off: bool = False) -> list[Pair]:
    """Return the pairs of a reply; an empty list when there are none.

    Args:
        reply: The text of the reply.
        is_cut_off: The endpoint stopped at its token limit: an unfinished last pair is dropped.
    """
    text = _FENCE.sub("", reply.strip())
    if text[:1] in "{[":
        return _parse_json(text)
    return _parse_text(text, is_cut_off)


def _parse_json(text: str) -> list[Pair]:
    try:
        found: Any = json.loads(text)
    except json.JSONDecodeError:
        found = _complete_objects(text)
    if isinstance(found, dict):
        found = next((value for value in found.values() if isinstance(value, list)), [found])
    pairs = [_json_pair(item) for item in found if isinstance(item, dict)]
    return [pair for pair in pairs if pair is not None]


def _complete_objects(text: str) -> list[Any]:
    """Return the innermost objects that are whole in a JSON text that is cut off."""
    found = []
    for match in re.finditer(r"\{[^{}]*\}", text):
        try:
            found.append(json.loads(match.group()))
        except json.JSONDecodeError:
            continue
    return found


def _json_pair(item: dict[str, Any]) -> Pair | None:
    question, answer = item.get("question"), item.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str):
        return None
    support = item.get("support")
    return _pair(question, answer, support if isinstance(support, str) and support else None)


def _parse_text(text: str, is_cut_off: bool) -> list[Pair]:
    fields: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        match = _LABEL.match(line)
        if match:
            label = "question" if match["label"].lower() in ("question", "q", "user") else "answer"
            fields.append((label, [match["rest"]]))
        elif fields and line.strip():
            fields[-1][1].append(line)
    pairs = []
    for index in range(len(fields) - 1):
        if fields[index][0] == "question" and fields[index + 1][0] == "answer":
            raw = " ".join(fields[index + 1][1]).strip()
            is_last = index + 2 == len(fields)
            if is_last and is_cut_off and (raw[:1] in _QUOTES) and raw[-1:] not in _QUOTES:
                continue
            pairs.append(_pair(" ".join(fields[index][1]), raw))
    return [pair for pair in pairs if pair is not None]


def _pair(question: str, answer: str, support: str | None = None) -> Pair | None:
    question, answer = _unquote(question), _unquote(answer)
    if not question or not answer:
        return None
    return Pair(question, answer, answer_type(answer), support)


def _unquote(text: str) -> str:
    text = " ".join(text.split()).strip("*_` ").rstrip(",")
    while len(text) > 1 and text[0] in _QUOTES and text[-1] in _QUOTES:
        text = text[1:-1].strip()
    if text.count('"') == 1:
        text = text.strip('"')
    return text.strip()


def answer_type(answer: str) -> AnswerType:
    """Return `closed` for an answer that is yes or no and nothing else."""
    return "closed" if _YES_NO.match(answer) else "open"
