"""Which published test set a file is, told by its counts and by its words.

In: records, one at a time. Out: one line a split that is recognised. The words are hashed without
regard to order, so that the same questions in another order are the same set.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

from clover.core.record import Record

_BITS = 128


class KnownSet(BaseModel):
    """A published set of questions: how many, and the hash of its words where they were at hand."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    open: int
    closed: int
    words: str | None = None

    @property
    def questions(self) -> int:
        """Return how many questions it holds."""
        return self.open + self.closed


@cache
def known_sets() -> tuple[KnownSet, ...]:
    """Return the sets of known.yaml."""
    rows = yaml.safe_load(Path(__file__).with_name("known.yaml").read_text(encoding="utf-8"))
    return tuple(KnownSet.model_validate(row) for row in rows)


@dataclass
class Count:
    """What one split holds so far."""

    open: int = 0
    closed: int = 0
    total: int = 0
    """Sum of the questions' hashes: the same in any order."""

    @property
    def words(self) -> str:
        """Return the hash of all questions and answers, in hex."""
        return f"{self.total:032x}"


class Census:
    """Counts questions by split, open and closed."""

    def __init__(self) -> None:
        self.splits: defaultdict[str | None, Count] = defaultdict(Count)

    def add(self, record: Record) -> None:
        """Count a record; a caption alone is none."""
        if record.question is None:
            return
        count = self.splits[record.split]
        if record.answer_type == "closed":
            count.closed += 1
        else:
            count.open += 1
        text = f"{record.question.strip().lower()}\n{(record.answer or '').strip().lower()}"
        digest = hashlib.sha256(text.encode(errors="replace")).digest()
        count.total = (count.total + int.from_bytes(digest[: _BITS // 8])) % (1 << _BITS)

    def lines(self) -> list[str]:
        """Return one line a split with questions: its counts, and the known set it is."""
        return [
            f"{split or 'no split'}: {count.open + count.closed:,} questions "
            f"({count.open:,} open, {count.closed:,} closed){_recognised(count)}"
            for split, count in sorted(self.splits.items(), key=lambda item: item[0] or "")
        ]


def _recognised(count: Count) -> str:
    alike = [
        known for known in known_sets() if (known.open, known.closed) == (count.open, count.closed)
    ]
    if not alike:
        return ""
    known = next((known for known in alike if known.words == count.words), alike[0])
    if known.words is None:
        return f": {known.name} by its counts (its words were not at hand to compare)"
    if known.words == count.words:
        return f": {known.name}, by its counts and its words"
    return f": as many as {known.name}, but other words"
