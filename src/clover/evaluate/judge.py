"""Judge predictions in chunks: what each truth and prediction give, as columns.

In: items. Out: `Columns`, numbers of fixed width alone, so that a million items are small and a
chunk can be judged in another process. A chunk is gone through column by column, because a loop
that does one thing runs twice as fast as one that does them all.
"""

from __future__ import annotations

import gc
import math
import signal
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from multiprocessing import get_context

from clover.core.run import uncollected
from clover.evaluate.copied import TrainingAnswers
from clover.evaluate.form import answer_form, question_form
from clover.evaluate.protocol import Item, Protocol, Rating, find_protocols
from clover.evaluate.protocol.normalise import first_yes_no
from clover.evaluate.protocol.strict import gold_label, strict_form

_MOST_ITEMS = 512
_MOST_CHARACTERS = 1 << 20
_MOST_FIGURES = 1 << 14
_MOST_WAITING = 8
_LABELS = {None: -1, "no": 0, "yes": 1}

Evidence = Counter[tuple[str | None, ...]]
"""Counts that the charges rest on: ("said", gold, label), and what `TrainingAnswers` counts."""


@dataclass
class Columns:
    """What is known of a run of items, in their order.

    Attributes:
        is_closed: One byte each.
        gold: The yes or no that is right, of closed items: 1, 0, or -1.
        questions: 64 bits of the question's form.
        forms: The same of the stated form, where there is one.
        answers: Of the truth's strict form.
        said: Of the prediction's form, or of the yes or no it says.
        true: Of the truth's form, as `said`.
        ratings: A protocol's five numbers each; NaN for None.
        labels: How a protocol read each closed prediction, as `gold`.
        evidence: What the charges need besides.
    """

    ratings: list[array[float]]
    labels: list[array[int]]
    is_closed: array[int] = field(default_factory=lambda: array("b"))
    gold: array[int] = field(default_factory=lambda: array("b"))
    questions: bytearray = field(default_factory=bytearray)
    forms: bytearray = field(default_factory=bytearray)
    answers: bytearray = field(default_factory=bytearray)
    said: bytearray = field(default_factory=bytearray)
    true: bytearray = field(default_factory=bytearray)
    evidence: Evidence = field(default_factory=Counter)

    @classmethod
    def empty(cls, num_protocols: int) -> Columns:
        """Return columns of no item."""
        return cls(
            ratings=[array("d") for _ in range(num_protocols)],
            labels=[array("b") for _ in range(num_protocols)],
        )

    def extend(self, other: Columns) -> None:
        """Add the items of a further chunk."""
        for mine, theirs in zip(self.ratings, other.ratings, strict=True):
            mine.extend(theirs)
        for labels, more in zip(self.labels, other.labels, strict=True):
            labels.extend(more)
        self.is_closed.extend(other.is_closed)
        self.gold.extend(other.gold)
        self.questions += other.questions
        self.forms += other.forms
        self.answers += other.answers
        self.said += other.said
        self.true += other.true
        self.evidence.update(other.evidence)


def chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Yield items in lists, short ones where the texts are long."""
    chunk: list[Item] = []
    characters = 0
    for item in items:
        chunk.append(item)
        characters += len(item.prediction)
        if len(chunk) >= _MOST_ITEMS or characters >= _MOST_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


class Judge:
    """Rates items under the same protocols."""

    def __init__(
        self, protocols: Sequence[Protocol], training: TrainingAnswers | None = None
    ) -> None:
        self._protocols = list(protocols)
        self._training = training
        self._figures: dict[Rating, array[float]] = {}

    def contract(self) -> tuple[list[str], TrainingAnswers | None]:
        """Return what another process needs to judge alike."""
        return [protocol.name for protocol in self._protocols], self._training

    def columns(self, items: Sequence[Item]) -> Columns:
        """Judge a chunk."""
        return self.judged(items)[0]

    def judged(self, items: Sequence[Item]) -> tuple[Columns, list[list[Rating]]]:
        """Judge a chunk; return its columns, and the ratings of each protocol."""
        ratings = [list(map(protocol.rate, items)) for protocol in self._protocols]
        golds = [gold_label(item) if item.is_closed else None for item in items]
        labels = [first_yes_no(item.prediction) if item.is_closed else None for item in items]
        pairs = list(zip(items, golds, labels, strict=True))
        said = [label or answer_form(item.prediction) for item, _, label in pairs]
        true = [gold or answer_form(item.answer) for item, gold, _ in pairs]
        answers = [gold or strict_form(item.answer) for item, gold, _ in pairs]
        questions = [question_form(item.question) for item in items]
        evidence: Evidence = Counter(
            ("said", gold, label) for gold, label in zip(golds, labels, strict=True) if gold
        )
        if self._training is not None:
            evidence.update(self._training.compare(items, questions, said, true))
        question_codes = _codes(questions)
        if any(item.form for item in items):
            forms = _codes(item.form or asked for item, asked in zip(items, questions, strict=True))
        else:
            forms = question_codes
        found = Columns(
            ratings=[self._numbers(of_protocol) for of_protocol in ratings],
            labels=[array("b", [_LABELS[one.label] for one in part]) for part in ratings],
            is_closed=array("b", [item.is_closed for item in items]),
            gold=array("b", [_LABELS[gold] for gold in golds]),
            questions=question_codes,
            forms=forms,
            answers=_codes(answers),
            said=_codes(said),
            true=_codes(true),
            evidence=evidence,
        )
        return found, ratings

    def _numbers(self, ratings: Iterable[Rating]) -> array[float]:
        """Return ratings as numbers; most ratings occur many times."""
        known, numbers = self._figures, array("d")
        for rating in ratings:
            figures = known.get(rating)
            if figures is None:
                if len(known) >= _MOST_FIGURES:
                    known.clear()
                values = [math.nan if value is None else value for value in rating[:5]]
                figures = known[rating] = array("d", values)
            numbers.extend(figures)
        return numbers


def judged_chunks(
    judge: Judge, items: Iterable[Item], *, workers: int
) -> Iterator[tuple[list[Item], Columns]]:
    """Yield chunks with their columns, in the order of the items.

    Args:
        judge: Of the protocols wanted.
        items: One at a time.
        workers: Processes that judge, beside this one that reads; 1 judges here.
    """
    if workers <= 1:
        with uncollected():
            for chunk in chunks(items):
                yield chunk, judge.columns(chunk)
        return
    # Spawned, not forked: whoever calls may hold threads.
    with ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_employ, initargs=judge.contract()
    ) as pool:
        waiting: deque[tuple[list[Item], Future[Columns]]] = deque()
        for chunk in chunks(items):
            waiting.append((chunk, pool.submit(_work, chunk)))
            if len(waiting) > _MOST_WAITING * workers:  # read no further ahead than memory allows
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()


_employed: list[Judge] = []
"""The judge of a worker process."""


def _employ(names: Sequence[str], training: TrainingAnswers | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is answered by who employs
    gc.disable()
    _employed.append(Judge(find_protocols(names), training))


def _work(chunk: list[Item]) -> Columns:
    return _employed[0].columns(chunk)


def _codes(texts: Iterable[str]) -> bytearray:
    """Return 64 bits of each text: a million texts share one by a chance of 3e-8.

    Not Python's own hash, which is salted: sums over questions would change in their last digits.
    """
    return bytearray().join(
        [blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts]
    )
