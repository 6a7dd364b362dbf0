"""LLaVA-Med: conversations about a figure, and the 50-figure evaluation questions (qa50).

A question is closed where the file says CLOSED, or, where it says nothing, if its answer is yes
or no. Each turn of a conversation is a record.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from clover.data.lines import Line, split_name
from clover.data.source.base import Options, Unique, clean, is_yes_or_no

_TWO_OPTIONS = re.compile(
    r"\s*please choose from the following two options:\s*\[yes, no\]\.?\s*$", re.IGNORECASE
)
_KEPT = ("domain", "type", "category", "pair_id", "fig_label")


def turns(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield question and answer of each turn, without the image's mark and the options offered."""
    question: str | None = None
    said = row.get("conversations", row.get("conversatons"))
    for turn in said if isinstance(said, list) else []:
        if not isinstance(turn, Mapping):
            continue
        text = clean(turn.get("value"))
        if turn.get("from") in ("human", "user"):
            question = _question(text)
        elif question is not None:
            yield question, text
            question = None


def _question(text: str) -> str:
    return _TWO_OPTIONS.sub("", text.replace("<image>", "")).strip()


def read(lines: Iterator[Line], options: Options) -> Iterator[Line]:
    """Yield one line a turn, in our columns."""
    unique = Unique()
    for line in lines:
        if not isinstance(line.row, dict):
            yield line
            continue
        pairs = list(turns(line.row))
        if "gpt4_answer" in line.row:
            pairs = [(_question(clean(line.row.get("text"))), clean(line.row["gpt4_answer"]))]
        if not pairs:  # a row without a question is set aside under that name, not dropped
            pairs = [("", "")]
        name = clean(line.row.get("id", line.row.get("question_id"))) or str(line.number)
        stated = clean(line.row.get("answer_type")).lower()
        for place, (question, answer) in enumerate(pairs, start=1):
            kind = stated or ("closed" if is_yes_or_no(answer) else "open")
            row = {key: line.row[key] for key in _KEPT if line.row.get(key) is not None}
            row |= {"question": question, "answer": answer, "answer_type": kind}
            row["id"] = unique(name if len(pairs) == 1 else f"{name}-{place}")
            row["image"] = line.row.get("image")
            row["caption"] = line.row.get("fig_caption", line.row.get("caption"))
            row["source"] = "llava-med"
            row["split"] = split_name(clean(line.row.get("split"))) or line.split
            yield line._replace(row=row)
