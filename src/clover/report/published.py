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

    @property
    def counts(self) -> list[int]:
        """How many closed and open questions were scored."""
        return [self.scores[key].count or 0 for key in ("closed", "open_recall")]


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
        count = number(run.details.get("trainable_parameters"))
        millions = None if count is None else count / 1e6
        return [_ours(title(run), protocol, millions, view, charges(run.details))]
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
            model = part(scores, "details", "header").get("model") or path.stem
            exposed = charges(part(scores, "details"))
            ours.append(_ours(str(model), str(name), None, scores, exposed))
    if not ours:
        raise CloverError(f"{path} holds no scores by protocol, as `clover score --json` prints")
    return ours


def _ours(
    model: str, protocol: str, trainable: float | None, scores: Row, exposed: Iterable[str]
) -> Ours:
    figures = {key: Figure.read(scores.get(key)) for key in _TITLES}
    return Ours(model, protocol, trainable, figures, tuple(exposed))


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
        own = run.counts in known["counts"]
        mark = "this run" if own else "this run, other questions *"
        model = run.model + " †" * bool(run.charges)
        table.rows.append([model, decimal(run.trainable), run.protocol, *cells, divided, mark])
    for line in dict.fromkeys(
        f"† {run.model} is exposed as {charge}" for run in runs for charge in run.charges
    ):
        table.notes.append(line)
    if any(run.counts not in known["counts"] for run in runs):
        sizes = " or ".join(f"{closed:,} + {open_:,}" for closed, open_ in known["counts"])
        table.notes.append(
            f"* not on this set's {sizes} closed and open questions: the columns can be read, the "
            "numbers cannot be compared"
        )
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
