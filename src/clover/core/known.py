"""Which published test set a file is, told by its counts and by its words.

In: questions with answers, one at a time. Out: one line a split that is recognised. The words are
hashed without regard to order, so that the same questions in another order are the same set.
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


@cache
def largest() -> int:
    """Return how many questions the largest known set holds."""
    return max(known.questions for known in known_sets())


def recognised(sentence: object) -> KnownSet | None:
    """Return the set that a sentence of `Count.known_as` recognises; None where it does not."""
    found = str(sentence)
    return next((known for known in known_sets() if found.startswith(known.name)), None)


@dataclass
class Count:
    """What one split holds so far."""

    open: int = 0
    closed: int = 0
    total: int = 0
    """Sum of the questions' hashes: the same in any order."""

    def add(self, question: str, answer: str, *, is_closed: bool) -> None:
        """Count a question."""
        if is_closed:
            self.closed += 1
        else:
            self.open += 1
        text = f"{question.strip().lower()}\n{answer.strip().lower()}"
        digest = hashlib.sha256(text.encode(errors="replace")).digest()
        self.total = (self.total + int.from_bytes(digest[: _BITS // 8])) % (1 << _BITS)

    def known_as(self) -> str | None:
        """Say which known set this is, and by what; None where the counts are no known set's."""
        alike = [
            known
            for known in known_sets()
            if (known.open, known.closed) == (self.open, self.closed)
        ]
        if not alike:
            return None
        known = next((known for known in alike if known.words == self.words), alike[0])
        if known.words is None:
            return f"{known.name} by its counts (its words were not at hand to compare)"
        if known.words == self.words:
            return f"{known.name}, by its counts and its words"
        return f"as many as {known.name}, but other words"

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
        is_closed = record.answer_type == "closed"
        self.splits[record.split].add(record.question, record.answer or "", is_closed=is_closed)

    def lines(self) -> list[str]:
        """Return one line a split with questions: its counts, and the known set it is."""
        return [
            f"{split or 'no split'}: {count.open + count.closed:,} questions "
            f"({count.open:,} open, {count.closed:,} closed)"
            + ("" if (name := count.known_as()) is None else f": {name}")
            for split, count in sorted(self.splits.items(), key=lambda item: item[0] or "")
        ]
