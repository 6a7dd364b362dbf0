"""One page about an instruction set: what it covers, how long, how balanced, and samples to review.

In: instruction records. Out: one self-contained HTML file (inline SVG, no other assets). Verdicts
given on the page are saved from it as JSONL, which `clover instruct filter --review` applies.
"""

from __future__ import annotations

import html
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clover.core.files import write_text
from clover.core.record import Record
from clover.instruct.lists import FOLDER
from clover.instruct.mix import UNKNOWN, body_part
from clover.instruct.vocabulary import dictionary

_BINS = 20
_LONGEST_BARS = 25
_WIDEST_LABEL = 380


@dataclass(frozen=True)
class Panel:
    """One chart: a title, a sentence under it, labelled values."""

    title: str
    note: str
    values: list[tuple[str, int]]
    is_histogram: bool = False


def write_statistics(
    records: Sequence[Record], *, out: str | Path, title: str, samples: int = 40, seed: int = 0
) -> None:
    """Write the page.

    Args:
        records: Questions with answers.
        out: The HTML file.
        title: Shown at the top; usually the data file's name.
        samples: How many records are shown for review by hand, drawn evenly over origins.
        seed: Decides which.
    """
    from jinja2 import Environment, select_autoescape

    environment = Environment(autoescape=select_autoescape(default=True))
    page = environment.from_string((FOLDER / "statistics.html.jinja").read_text(encoding="utf-8"))
    write_text(
        out,
        page.render(
            title=title,
            facts=facts(records),
            panels=[(panel, draw(panel)) for panel in panels(records)],
            samples=[_sample(record) for record in _draw_samples(records, samples, seed)],
            name=json.dumps(title).replace("<", "\\u003c"),
        ),
    )


def facts(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Return the numbers that open the page."""
    questions = [len((record.question or "").split()) for record in records]
    answers = [len((record.answer or "").split()) for record in records]
    closed = sum(record.answer_type == "closed" for record in records)
    return [
        ("instructions", f"{len(records):,}"),
        # Some caption files name no image file: their records know which belong together.
        ("images", f"{len({r.image or r.group or r.id for r in records}):,}"),
        ("closed", f"{closed:,}"),
        ("mean question", f"{sum(questions) / len(questions):.1f} words"),
        ("mean answer", f"{sum(answers) / len(answers):.1f} words"),
    ]


def panels(records: Sequence[Record]) -> list[Panel]:
    """Return the charts: coverage, lengths, balance, questions, where it comes from."""
    parts = Counter(body_part(record) for record in records)
    named = len(records) - parts[UNKNOWN]
    return [
        Panel(
            "Body parts",
            f"First organ or tissue that the caption states, by a word list of "
            f"{len(dictionary('body_parts').terms)}; known for {named / len(records):.0%}.",
            _top(parts, UNKNOWN),
        ),
        Panel(
            "Diagnoses",
            f"Diagnosis that the caption states, by a word list of "
            f"{len(dictionary('diagnoses').terms)}.",
            _top(Counter(_diagnosis(record) for record in records), UNKNOWN),
        ),
        _lengths("Question length", [len((r.question or "").split()) for r in records]),
        _lengths("Answer length", [len((r.answer or "").split()) for r in records]),
        Panel(
            "Yes and no",
            "Answers of closed questions.",
            _top(Counter(a for r in records if (a := _yes_no(r)) is not None)),
        ),
        Panel(
            "Most frequent questions",
            f"{len({(r.question or '').lower() for r in records}):,} different questions.",
            Counter((r.question or "").strip() for r in records).most_common(15),
        ),
        Panel(
            "Where it comes from",
            "Origin and prompt or template version.",
            _top(
                Counter(f"{r.origin or UNKNOWN} ({getattr(r, 'prompt', 'none')})" for r in records)
            ),
        ),
        Panel(
            "Licences", "As the records state them.", _top(Counter(_licence(r) for r in records))
        ),
    ]


def _licence(record: Record) -> str:
    return record.licence or UNKNOWN


def _diagnosis(record: Record) -> str:
    stated = dictionary("diagnoses").stated(record.caption or record.answer or "")
    return stated[0] if stated else UNKNOWN


def _yes_no(record: Record) -> str | None:
    answer = (record.answer or "").strip().lower().rstrip(".!")
    return answer if answer in ("yes", "no") else None


def _top(counts: Counter[str], last: str | None = None) -> list[tuple[str, int]]:
    """Return the largest counts; the rest as one, and `last` at the end."""
    unknown = counts.pop(last, 0) if last else 0
    listed = counts.most_common(_LONGEST_BARS)
    rest = counts.total() - sum(count for _, count in listed)
    extra = [(f"{len(counts) - len(listed)} others", rest), (last or "", unknown)]
    return listed + [(name, count) for name, count in extra if count]


def _lengths(title: str, lengths: list[int]) -> Panel:
    """Return a histogram; the longest hundredth shares the last bar, or it would flatten all."""
    ordered = sorted(lengths)
    top = max(1, ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))])
    width = max(1, -(-top // _BINS))
    bars: Counter[int] = Counter(min(length // width, top // width) for length in lengths)
    values = [
        (f"{bar * width}" if width == 1 else f"{bar * width}-{bar * width + width - 1}", bars[bar])
        for bar in range(max(bars) + 1)
    ]
    if max(lengths) > top:
        values[-1] = (f"{values[-1][0].split('-')[0]}+", values[-1][1])
    middle = ordered[len(ordered) // 2]
    note = f"Words; median {middle}, from {ordered[0]} to {ordered[-1]}."
    return Panel(title, note, values, is_histogram=True)


def draw(panel: Panel) -> str:
    """Return a panel as inline SVG."""
    if not panel.values:
        return "<p class='none'>none</p>"
    return _columns(panel) if panel.is_histogram else _bars(panel)


def _bars(panel: Panel) -> str:
    most = max(count for _, count in panel.values)
    height = 22 * len(panel.values) + 4
    longest = max(len(name) for name, _ in panel.values)
    label, width = min(_WIDEST_LABEL, max(250, 7 * longest)), 560
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_safe(panel.title)}">']
    for row, (name, count) in enumerate(panel.values):
        y = 22 * row + 4
        length = (width - label - 70) * count / most
        letters = (label - 8) // 6
        shown = name if len(name) <= letters else name[: letters - 1] + "…"
        kind = "unknown" if name == UNKNOWN else "bar"
        parts.append(
            f"<g><title>{_safe(name)}: {count:,}</title>"
            f'<text x="{label - 8}" y="{y + 13}" text-anchor="end">{_safe(shown)}</text>'
            f'<rect class="{kind}" x="{label}" y="{y}" width="{length:.1f}" height="17" rx="2"/>'
            f'<text x="{label + length + 6:.1f}" y="{y + 13}">{count:,}</text></g>'
        )
    return "".join([*parts, "</svg>"])


def _columns(panel: Panel) -> str:
    most = max(count for _, count in panel.values)
    width, height, foot = 560, 200, 22
    step = width / len(panel.values)
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_safe(panel.title)}">']
    every = -(-len(panel.values) // 10)
    for column, (name, count) in enumerate(panel.values):
        tall = (height - foot - 14) * count / most
        x, y = step * column, height - foot - tall
        parts.append(
            f"<g><title>{_safe(name)} words: {count:,}</title>"
            f'<rect class="bar" x="{x + 1:.1f}" y="{y:.1f}" width="{step - 2:.1f}" '
            f'height="{tall:.1f}"/></g>'
        )
        if column % every == 0:
            parts.append(
                f'<text x="{x + step / 2:.1f}" y="{height - 6}" text-anchor="middle">'
                f"{_safe(name)}</text>"
            )
    return "".join([*parts, "</svg>"])


def _safe(text: str) -> str:
    return html.escape(text, quote=True)


def _draw_samples(records: Sequence[Record], count: int, seed: int) -> list[Record]:
    """Draw samples evenly over origins, so that a small part of the set is seen too."""
    rng = random.Random(seed)
    by_origin: dict[str, list[Record]] = {}
    for record in records:
        by_origin.setdefault(record.origin or UNKNOWN, []).append(record)
    drawn: list[Record] = []
    each = -(-count // max(1, len(by_origin)))
    for pool in by_origin.values():
        drawn.extend(rng.sample(pool, min(each, len(pool))))
    rng.shuffle(drawn)
    return drawn[:count]


def _sample(record: Record) -> dict[str, str]:
    return {
        "id": record.id,
        "image": record.image or record.id,
        "caption": record.caption or "",
        "question": record.question or "",
        "answer": record.answer or "",
        "origin": record.origin or UNKNOWN,
    }
