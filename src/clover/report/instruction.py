"""What the model was taught with: where instructions come from, and what the filter turned away."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from markupsafe import Markup

from clover.core.chart import Bar, bar_chart, histogram
from clover.report.figure import decimal, words
from clover.report.reading import INSTRUCTIONS, Row, Run

_ORIGINS = {
    "template": "template-based",
    "generated": "generation-based",
    "truth": "phantom's truth",
    "human": "by people",
}
_SAMPLES_EACH = 3
_MOST_REASONS = 12
_LONGEST_SHOWN = 280


def training_set(run: Run) -> list[Row]:
    """Return the set that was trained on: the hybrid, or all that there is without one."""
    found = run.instructions
    if found.get("hybrid"):
        return found["hybrid"]
    return [row for name in INSTRUCTIONS for row in found.get(name, [])]


def _origin(row: Row) -> str:
    found = str(row.get("origin") or "not stated")
    return _ORIGINS.get(found, found)


def count_rows(run: Run) -> list[tuple[str, str]]:
    """Return how many instructions each file holds, and how many were turned away."""
    rows = [
        (_ORIGINS.get(name, name), f"{len(run.instructions[name]):,}")
        for name in INSTRUCTIONS
        if run.instructions.get(name)
    ]
    if run.rejected:
        rows.append(("turned away by the filter", f"{len(run.rejected):,}"))
    return rows


def origin_chart(rows: Sequence[Row]) -> Markup:
    """Draw how many instructions each way of making them gave to the training set."""
    counts = Counter(_origin(row) for row in rows).most_common()
    total = max(1, len(rows))
    bars = [
        Bar(name, count, text=f"{count:,} ({decimal(100 * count / total, 0)} %)")
        for name, count in counts
    ]
    return bar_chart(bars, title="instructions by origin")


def reason_chart(rejected: Sequence[Row]) -> Markup:
    """Draw why the filter turned instructions away, the commonest reasons first."""
    counts = Counter(str(row.get("reason") or "no reason") for row in rejected).most_common()
    bars = [Bar(name, count, text=f"{count:,}") for name, count in counts[:_MOST_REASONS]]
    rest = sum(count for _, count in counts[_MOST_REASONS:])
    if rest:
        bars.append(Bar("other reasons", rest, text=f"{rest:,}"))
    return bar_chart(bars, title="turned away by the filter")


def length_charts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the distribution of words of questions, and of answers that are not yes or no."""
    questions = [words(row.get("question")) for row in rows if row.get("question")]
    answers = [
        words(row.get("answer")) for row in rows if row.get("answer") and not _is_closed(row)
    ]
    charts = []
    for name, found in (("Questions", questions), ("Open answers", answers)):
        if found:
            charts.append(
                {
                    "title": name,
                    "chart": histogram(found, title=name, x_label="words"),
                    "caption": f"{len(found):,}; mean {decimal(fmean(found))}, "
                    f"median {decimal(median(found), 0)}, longest {max(found):,} words",
                }
            )
    return charts


def _is_closed(row: Row) -> bool:
    if row.get("answer_type"):
        return bool(row["answer_type"] == "closed")
    return str(row.get("answer", "")).strip().lower().rstrip(".") in ("yes", "no")


def balance(rows: Sequence[Row]) -> str:
    """Say how even yes and no are, over all closed questions and in the least even form."""
    closed = [row for row in rows if _is_closed(row)]
    if not closed:
        return "No closed questions."
    said = f"{len(closed):,} of {len(rows):,} are closed; {decimal(_yes(closed))} % of them yes"
    forms = defaultdict(list)
    for row in closed:
        if row.get("form"):
            forms[str(row["form"])].append(row)
    if forms:
        worst = max(forms, key=lambda name: abs(_yes(forms[name]) - 50))
        said += (
            f"; least even form: {worst.replace('_', ' ')}, {decimal(_yes(forms[worst]))} % "
            f"of {len(forms[worst]):,}"
        )
    return said + "."


def _yes(rows: Sequence[Row]) -> float:
    yes = sum(str(row.get("answer", "")).strip().lower().startswith("yes") for row in rows)
    return 100 * yes / len(rows)


def samples(rows: Sequence[Row], rejected: Sequence[Row]) -> list[dict[str, str]]:
    """Return a few instructions of each origin, evenly spread over the file, and rejected ones."""
    by_origin: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_origin[_origin(row)].append(row)
    chosen = [
        _sample(name, row) for name, found in sorted(by_origin.items()) for row in _spread(found)
    ]
    for row in _spread(rejected):
        content = row.get("content")
        shown = content if isinstance(content, dict) else {"question": content}
        chosen.append(_sample(f"turned away: {row.get('reason') or 'no reason'}", shown))
    return chosen


def _spread(rows: Sequence[Row]) -> list[Row]:
    step = max(1, len(rows) // _SAMPLES_EACH)
    return list(rows[step // 2 :: step][:_SAMPLES_EACH])


def _sample(origin: str, row: Row) -> dict[str, str]:
    return {
        "origin": origin,
        "question": _short(row.get("question")),
        "answer": _short(row.get("answer")),
    }


def _short(text: Any) -> str:
    said = "" if text is None else str(text)
    return said if len(said) <= _LONGEST_SHOWN else said[: _LONGEST_SHOWN - 1] + "…"
