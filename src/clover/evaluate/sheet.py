"""The score sheet: every item's ratings under several protocols, as compact columns.

In: items, one at a time. Out: per protocol the scores with n, interval and details. A million items
take some 100 bytes each and protocol; no text is kept but distinct questions and answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clover.core.known import Count, largest
from clover.evaluate.copied import TrainingAnswers
from clover.evaluate.expose import Witness
from clover.evaluate.interval import bootstrap_means, cluster_codes, interval
from clover.evaluate.judge import Columns, Judge, chunks, judged_chunks
from clover.evaluate.prior import majority, question_only
from clover.evaluate.protocol import DROPPED, METRICS, Item, Protocol, Rating

SCORE_KEYS = ("closed", "open_recall", "open_precision", "open_f1", "open_exact")


class Sheet:
    """Ratings of many items under the same protocols."""

    def __init__(
        self, protocols: Sequence[Protocol], training: TrainingAnswers | None = None
    ) -> None:
        self.protocols = list(protocols)
        self.count = Count()
        self._most_counted = largest() + 1  # one more is none of them, however many follow
        self.ids: list[Any] = []
        self.images: list[str | None] = []
        self._same: dict[str, str] = {}
        self._judge = Judge(protocols, training)
        self._columns = Columns.empty(len(protocols))
        self.witness = Witness(self._columns, has_training=training is not None)

    def __len__(self) -> int:
        return len(self.ids)

    def fill(self, items: Iterable[Item], *, workers: int = 1) -> None:
        """Rate items under every protocol, in as many processes; one is this process."""
        for chunk, columns in judged_chunks(self._judge, items, workers=workers):
            self._note(chunk, columns)

    def rated(self, items: Iterable[Item]) -> Iterator[tuple[Item, tuple[Rating, ...]]]:
        """Rate items as `fill`; yield each with its ratings, in the order of the protocols."""
        for chunk in chunks(items):
            columns, ratings = self._judge.judged(chunk)
            self._note(chunk, columns)
            yield from zip(chunk, zip(*ratings, strict=True), strict=True)

    def _note(self, items: Sequence[Item], columns: Columns) -> None:
        for item in items[: max(0, self._most_counted - len(self.ids))]:
            self.count.add(item.question, item.answer, is_closed=item.is_closed)
        self.ids += [item.id for item in items]
        same = self._same.setdefault
        self.images += [
            None if item.image is None else same(item.image, item.image) for item in items
        ]
        self._columns.extend(columns)

    def ratings(self, name: str) -> NDArray[np.float64]:
        """Return a protocol's ratings [N, 5] in the order of `METRICS`; NaN where there is none."""
        numbers = self._columns.ratings[self._place(name)]
        return np.frombuffer(numbers, dtype=np.float64).reshape(-1, len(METRICS))

    def _place(self, name: str) -> int:
        return next(place for place, one in enumerate(self.protocols) if one.name == name)

    def columns(self, name: str) -> NDArray[np.float64]:
        """Return what the scores average, [N, 5] in the order of `SCORE_KEYS`.

        Dropped items are NaN, and the open columns are NaN on closed items.
        """
        columns = self.ratings(name).copy()
        columns[columns[:, 0] == DROPPED, 0] = np.nan
        columns[self.is_closed, 1:] = np.nan
        return columns

    @property
    def is_closed(self) -> NDArray[np.bool_]:
        """Which items are closed, [N]."""
        return np.frombuffer(self._columns.is_closed, dtype=np.int8).astype(bool)

    def cluster_names(self) -> list[str]:
        """Return each item's image, or the item itself where no image is named."""
        return [
            f"item {identity}" if image is None else f"image {image}"
            for identity, image in zip(self.ids, self.images, strict=True)
        ]

    def clustered_by(self) -> str:
        """Say what the bootstrap draws: images, items, or both where some name no image."""
        without = sum(image is None for image in self.images)
        if not without:
            return "image"
        return "item" if without == len(self) else "image, else item"

    def scores(self, *, draws: int, seed: int) -> dict[str, dict[str, Any]]:
        """Return, by protocol name, the five scores in percent and their details."""
        codes = cluster_codes(self.cluster_names())
        tables = [self.columns(protocol.name) for protocol in self.protocols]
        has_interval = draws > 0 and int(codes.max()) > 0
        means = (
            bootstrap_means(np.concatenate(tables, axis=1), codes, draws=draws, seed=seed)
            if has_interval
            else np.full((1, len(SCORE_KEYS) * len(tables)), np.nan)
        )
        shared = {
            "clustered_by": self.clustered_by(),
            "clusters": int(codes.max()) + 1,
            "draws": draws,
            "seed": seed,
        }
        baselines = {**self._baselines(), "exposed": self.witness.findings()}
        return {
            protocol.name: {
                **_summary(table, means[:, place * 5 : place * 5 + 5]),
                "details": {
                    "protocol": protocol.name,
                    "version": protocol.version,
                    **self._bias(protocol.name),
                    **baselines,
                    **shared,
                },
            }
            for place, (protocol, table) in enumerate(zip(self.protocols, tables, strict=True))
        }

    def _bias(self, name: str) -> dict[str, Any]:
        """Return how the predictions to closed questions were read, in percent."""
        closed = self.is_closed
        labels = np.frombuffer(self._columns.labels[self._place(name)], dtype=np.int8)[closed]
        gold = np.frombuffer(self._columns.gold, dtype=np.int8)[closed]
        ratings = self.ratings(name)
        found: dict[str, Any] = {
            "unparsed": _percent(labels == -1),
            "yes_rate": _percent(labels == 1),
            "base_rate": _percent(gold[gold >= 0] == 1),
            "num_closed": int(closed.sum()),
            "num_open": int((~closed).sum()),
            "dropped": int((ratings[:, 0] == DROPPED).sum()),
            "unscorable": int(np.isnan(ratings[closed, 0]).sum()),
        }
        of_closed = ratings[closed, 1]
        if of_closed.size and not np.isnan(of_closed).all():
            found["closed_recall"] = 100 * math.fsum(of_closed) / of_closed.size
        return found

    def _baselines(self) -> dict[str, Any]:
        """Return what the answers alone would score, in percent (strict rules)."""
        questions, answers = (
            np.unique(np.frombuffer(codes, dtype="<i8"), return_inverse=True)[1]
            for codes in (self._columns.forms, self._columns.answers)
        )
        yes_no = np.frombuffer(self._columns.gold, dtype=np.int8) >= 0
        is_open = ~self.is_closed
        return {
            "majority": {
                "closed": majority(answers[yes_no]),
                "open_exact": majority(answers[is_open]),
            },
            "question_only": {
                "closed": question_only(questions[yes_no], answers[yes_no], is_yes_no=True),
                "open_exact": question_only(questions[is_open], answers[is_open], is_yes_no=False),
            },
        }


def _percent(hits: NDArray[np.bool_]) -> float | None:
    return 100 * float(hits.mean()) if hits.size else None


def _summary(table: NDArray[np.float64], means: NDArray[np.float64]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for place, key in enumerate(SCORE_KEYS):
        known = table[~np.isnan(table[:, place]), place]
        low, high = interval(means[:, place])
        # fsum is exact, so that the order of the rows cannot change the last digit.
        summary[key] = {
            "value": 100 * math.fsum(known) / known.size if known.size else None,
            "n": int(known.size),
            "low": None if low is None else round(100 * low, 4),
            "high": None if high is None else round(100 * high, 4),
        }
    return summary


def rated_rows(sheet: Sheet, items: Iterable[Item]) -> Iterator[dict[str, Any]]:
    """Rate items one by one and yield a row an item and protocol, for `--per-item`."""
    for item, ratings in sheet.rated(items):
        for protocol, rating in zip(sheet.protocols, ratings, strict=True):
            row: dict[str, Any] = {"id": item.id, "protocol": protocol.name}
            row.update(zip(METRICS, rating[:5], strict=True))
            if rating.closed == DROPPED:
                row["closed"] = "dropped"
            if protocol.extras is not None:
                row.update(protocol.extras(item))
            yield row
