"""Our runs beside published rows: one table a test set, as text, LaTeX or HTML.

In: run folders, or files that `clover score --json` printed. Out: tables in which every quoted
figure is marked as quoted and says what differs in how it was measured.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from math import log10
from pathlib import Path
from textwrap import wrap
from typing import Any

import yaml

from clover.core.errors import CloverError, nearest
from clover.core.known import KnownSet, known_sets, recognised
from clover.core.terminal import align_columns
from clover.report.figure import DASH, Figure, decimal, number
from clover.report.reading import Row, charges, part, read_run, title

_WIDTH = 100
NOTICE = "Research use, not for diagnosis."
_TITLES = {
    "closed": "closed",
    "open_recall": "open recall",
    "open_precision": "open precision",
    "open_f1": "open F1",
}


@dataclass(frozen=True)
class Ours:
    """One run under one protocol."""

    model: str
    protocol: str
    trainable: float | None
    """In millions."""
    scores: dict[str, Figure]
    charges: tuple[str, ...] = ()
    """What it was exposed as: a blind model, a yes-sayer, a copier."""
    known: KnownSet | None = None
    """The published set whose questions were asked."""
    has_words: bool = False
    """Whether that was told by the questions' words too, not by their counts alone."""


@dataclass
class Table:
    """Cells and footnotes, without a form yet."""

    title: str
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)
    num_ours: int = 0
    notes: list[str] = field(default_factory=list)


def published() -> dict[str, Any]:
    """Return the quoted rows: `sources` and `sets`."""
    text = files("clover.report").joinpath("published.yaml").read_text("utf-8")
    data: dict[str, Any] = yaml.safe_load(text)
    return data


def read_ours(path: Path) -> list[Ours]:
    """Read a run folder, or a file that `clover score --json` printed, one entry a protocol.

    Raises:
        CloverError: neither of them, or without scores.
    """
    if path.is_dir():
        run = read_run(path)
        view = part(run.details, "views", "image") or run.scores
        if not view:
            raise CloverError(f"{path} has no scores.json; `clover evaluate` writes it")
        protocol = str(run.details.get("protocol", "strict")).partition("@")[0]
        return [_ours(title(run), protocol, view, run.details)]
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CloverError(f"no run folder or score file {path}") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise CloverError(
            f"{path} is not JSON; give a run folder or what `clover score --json` printed"
        ) from error
    protocols = found if isinstance(found, dict) else {}
    ours = []
    for name, scores in protocols.items():
        if part(scores, "closed") or part(scores, "open_recall"):
            details = part(scores, "details")
            model = part(details, "header").get("model") or path.stem
            ours.append(_ours(str(model), str(name), scores, details))
    if not ours:
        raise CloverError(f"{path} holds no scores by protocol, as `clover score --json` prints")
    return ours


def _ours(model: str, protocol: str, scores: Row, details: Row) -> Ours:
    count = number(details.get("trainable_parameters"))
    figures = {key: Figure.read(scores.get(key)) for key in _TITLES}
    known = _known_set(figures, details)
    return Ours(
        model,
        protocol,
        None if count is None else count / 1e6,
        figures,
        tuple(charges(details)),
        known,
        has_words="known_set" in details and known is not None and known.words is not None,
    )


def _known_set(figures: Mapping[str, Figure], details: Row) -> KnownSet | None:
    """Return the set that the scorer recognised; told by counts where an older file says nothing.

    The counts are of the questions asked: a protocol may score fewer, or none of the closed ones.
    """
    if "known_set" in details:
        return recognised(details["known_set"])
    closed, open_ = (
        details.get(f"num_{kind}", figures[key].count)
        for kind, key in (("closed", "closed"), ("open", "open_recall"))
    )
    return next(
        (known for known in known_sets() if (known.closed, known.open) == (closed, open_)), None
    )


def tables(runs: Sequence[Ours], sets: Iterable[str] = ()) -> list[Table]:
    """Return a table for each test set, our runs first.

    Args:
        runs: Ours, in the order of their lines.
        sets: Names of the sets; nothing means all.

    Raises:
        CloverError: an unknown set.
    """
    data = published()
    chosen = list(sets) or list(data["sets"])
    for name in chosen:
        if name not in data["sets"]:
            raise CloverError(f"no test set '{name}'{nearest(name, data['sets'])}")
    return [_table(runs, data["sets"][name], data["sources"]) for name in chosen]


def _table(runs: Sequence[Ours], known: Mapping[str, Any], sources: Mapping[str, Any]) -> Table:
    columns, over = known["columns"], known["divided"]
    head = ["model", "trainable, M", "rule", *(_TITLES[key] for key in columns)]
    head += [", ".join(_TITLES[key] for key in over) + " / log10(M)", "from"]
    table = Table(known["title"], head)
    table.num_ours = len(runs)
    for run in runs:
        cells = [_with_interval(run.scores[key]) for key in columns]
        divided = _divided([run.scores[key].value for key in over], run.trainable)
        own = run.known is not None and run.known.name in known["known"]
        mark = "this run" if own else "this run, other questions *"
        model = run.model + " †" * bool(run.charges)
        table.rows.append([model, decimal(run.trainable), run.protocol, *cells, divided, mark])
    for line in dict.fromkeys(
        f"† {run.model} is exposed as {charge}" for run in runs for charge in run.charges
    ):
        table.notes.append(line)
    table.notes += _question_notes(runs, known["known"])
    rules = {sources[row["source"]]["protocol"] for row in known["rows"]}
    if other := sorted({run.protocol for run in runs} - rules):
        table.notes.append(
            f"{', '.join(other)}: not the quoted rows' rule; `clover score --protocol "
            f"{','.join(sorted(rules))} --json` gives these predictions theirs"
        )
    cited: dict[str, str] = {}
    for row in known["rows"]:
        letter = cited.setdefault(row["source"], chr(ord("a") + len(cited)))
        values = [row.get(key) for key in columns]
        table.rows.append(
            [
                row["model"],
                decimal(row.get("trainable"), 0),
                sources[row["source"]]["protocol"],
                *(decimal(value, 2) for value in values),
                _divided([row.get(key) for key in over], row.get("trainable")),
                f"quoted [{letter}]",
            ]
        )
    for name, letter in cited.items():
        source = sources[name]
        table.notes.append(f"[{letter}] {source['text']}. Differs: {source['differs']}.")
    table.notes.append("Quoted figures were not measured by us; ours carry 95 % intervals.")
    return table


def _question_notes(runs: Sequence[Ours], names: Sequence[str]) -> list[str]:
    """Return what is to be said of runs on other questions, and of those told by counts alone."""
    notes = []
    own = [run for run in runs if run.known is not None and run.known.name in names]
    if len(own) < len(runs):
        sizes = " or ".join(
            f"{known.closed:,} + {known.open:,}" for known in known_sets() if known.name in names
        )
        notes.append(
            f"* not this set's {sizes} closed and open questions, by their counts or their words: "
            "the columns can be read, the numbers cannot be compared"
        )
    if counted := dict.fromkeys(run.model for run in own if not run.has_words):
        notes.append(
            f"{', '.join(counted)}: taken for this set by the counts of its questions; their "
            "words were not compared"
        )
    return notes


def _with_interval(figure: Figure) -> str:
    if figure.value is None:
        return DASH
    if figure.low is None or figure.high is None:
        return decimal(figure.value, 2)
    return f"{figure.value:.2f} [{figure.low:.1f}, {figure.high:.1f}]"


def _divided(values: Sequence[Any], millions: float | None) -> str:
    """Return the scores divided by log10 of the trainable millions, as the paper prints them."""
    if not millions or millions <= 1:
        return DASH
    known = [number(value) for value in values]
    return " / ".join(DASH if v is None else f"{v / log10(millions):.2f}" for v in known)


def as_text(found: Sequence[Table]) -> str:
    """Return tables for a terminal; a rule stands between ours and quoted rows."""
    lines: list[str] = []
    for table in found:
        shown = align_columns([table.head, *table.rows])
        rule = "─" * max(map(len, shown))
        split = 1 + table.num_ours
        lines += [table.title, rule, shown[0], rule, *shown[1:split], rule, *shown[split:], rule]
        for note in table.notes:
            lines += wrap(note, _WIDTH)
        lines.append("")
    return "\n".join([*lines, NOTICE])


_LATEX = {
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "†": r"\dag{}",
    "−": "$-$",
}


def _latex(text: str) -> str:
    return re.sub(r"[&%$#_{}\\~^–−†]", lambda found: _LATEX[found.group()], text)


def as_latex(found: Sequence[Table]) -> str:
    """Return a `table` environment for each set; needs the package booktabs."""
    parts = []
    for table in found:
        lines = [r"\begin{table}", r"\centering\small", rf"\caption{{{_latex(table.title)}}}"]
        lines += [rf"\begin{{tabular}}{{lrl{'r' * (len(table.head) - 4)}l}}", r"\toprule"]
        rows = [" & ".join(map(_latex, row)) + r" \\" for row in [table.head, *table.rows]]
        split = 1 + table.num_ours
        lines += [rows[0], r"\midrule", *rows[1:split], r"\midrule", *rows[split:]]
        lines += [r"\bottomrule", r"\end{tabular}", r"\par\smallskip\footnotesize\raggedright"]
        lines += [_latex(note) + r"\par" for note in table.notes]
        parts.append("\n".join([*lines, r"\end{table}"]))
    return "\n\n".join([f"% {NOTICE}", *parts])


def as_html(found: Sequence[Table]) -> str:
    """Return one self-contained page."""
    css = files("clover.report").joinpath("page.css").read_text("utf-8")
    body = []
    for table in found:
        cells = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in table.head)
        rows = [
            f"<tr{'' if at < table.num_ours else ' class=quoted'}>"
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
            + "</tr>"
            for at, row in enumerate(table.rows)
        ]
        notes = "".join(
            f'<p class="{"exposed" if note[0] == "†" else "muted"}">{html.escape(note)}</p>'
            for note in table.notes
        )
        body.append(
            f"<h2>{html.escape(table.title)}</h2>"
            f'<div class="scroll" tabindex="0"><table><thead><tr>{cells}</tr></thead>'
            f"<tbody>{''.join(rows)}</tbody></table></div>{notes}"
        )
    style = f"{css}\n.quoted td {{ color: var(--muted); font-style: italic; }}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>CLOVER: beside published rows</title><style>{style}</style></head><body>"
        f'<h1>Beside published rows</h1><p class="notice">{NOTICE}</p>{"".join(body)}'
        "</body></html>\n"
    )


FORMATS = {"text": as_text, "latex": as_latex, "html": as_html}
