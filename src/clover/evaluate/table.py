"""The scores as a person reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clover.core.terminal import align_columns

_TITLES = {
    "closed": "closed accuracy",
    "open_recall": "open recall",
    "open_precision": "open precision",
    "open_f1": "open F1",
    "open_exact": "open exact",
}
_MOST_COLUMNS = 3
"""Protocols side by side, so that a table fits a terminal of 120 columns."""

_PAIRED = ("McNemar p", "right alone here / there")

FOOTNOTE = "Research use, not for diagnosis."


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def cell(figure: Mapping[str, Any]) -> str:
    """Return ``89.38 [88.31, 90.42]``, or a dash where there is no value."""
    if figure["value"] is None:
        return "-"
    if figure["low"] is None:
        return f"{figure['value']:.2f}"
    return f"{figure['value']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"


def score_lines(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the scores of several protocols as aligned tables with their notes."""
    names = list(scores)
    details = scores[names[0]]["details"]
    lines: list[str] = []
    for start in range(0, len(names), _MOST_COLUMNS):
        shown = names[start : start + _MOST_COLUMNS]
        lines += [*align_columns(_block({name: scores[name] for name in shown})), ""]
    lines += _per_log_lines(scores)
    if details.get("known_set"):
        lines.append(f"the questions: {details['known_set']}")
    base = _percent(details["base_rate"])
    lines += [
        f"closed questions whose truth is yes: {base}% of {details['num_closed']:,}",
        *_baseline_lines(details),
        "",
        *exposure_lines(details["exposed"]),
        "",
        "percent [95 % interval]: "
        f"{details['draws']:,} bootstrap draws of {details['clusters']:,} clusters "
        f"(by {details['clustered_by']}), seed {details['seed']}",
        "protocols: " + "; ".join(f"{name} {scores[name]['details']['version']}" for name in names),
        FOOTNOTE,
    ]
    return lines


def _block(scores: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    rows = [["", *scores]]
    for key, title in _TITLES.items():
        rows.append([title, *(_counted(found[key]) for found in scores.values())])
    for key, title in (("unparsed", "closed, unparsed"), ("yes_rate", "closed, says yes")):
        rows.append([title, *(_percent(found["details"][key]) for found in scores.values())])
    return rows


def _counted(figure: Mapping[str, Any]) -> str:
    return f"{cell(figure)} n={figure['n']:,}" if figure["n"] else "-"


def _per_log_lines(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = [["score / log10(trainable millions)", *_TITLES.values()]]
    for name, found in scores.items():
        if "per_log_parameters" in found["details"]:
            figures = found["details"]["per_log_parameters"]
            rows.append([name, *(_percent(figures.get(key)) for key in _TITLES)])
    return [*align_columns(rows), ""] if len(rows) > 1 else []


def _baseline_lines(details: Mapping[str, Any]) -> list[str]:
    rows = [["baselines that see no image (strict)", "closed", "open exact"]]
    for key, title in (
        ("majority", "always the commonest answer"),
        ("question_only", "the commonest answer to the same question"),
    ):
        found = details[key]
        rows.append([title, _percent(found["closed"]), _percent(found["open_exact"])])
    return align_columns(rows)


def exposure_lines(found: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each charge, or one that says what was looked for in vain."""
    lines = [f"exposed as {charge['sentence']}" for charge in found["charges"]]
    if not lines:
        lines.append("not exposed as blind, a yes-sayer, a no-sayer or a copier")
    looks = found["looks"]
    if looks["n"] and not any(charge["name"] == "blind" for charge in found["charges"]):
        doubt = ": too few to say whether it looks" if looks["low"] <= 0 else ""
        lines.append(
            "over its own answers dealt out at random among the images of the same question: "
            f"{looks['gain']:+.1f} points [{looks['low']:+.1f}, {looks['high']:+.1f}], "
            f"n={looks['n']:,}{doubt}"
        )
    if found["not_tried"]:
        lines.append("not tried: " + "; ".join(found["not_tried"]))
    return lines


def comparison_lines(comparison: Mapping[str, Mapping[str, Any]], against: str) -> list[str]:
    """Return a paired comparison as an aligned table: ours minus theirs, in points."""
    rows = [[f"minus {against}", "protocol", "points [95 %]", "p", *_PAIRED, "n"]]
    for name, found in comparison.items():
        for key, title in _TITLES.items():
            figure = found[key]
            if not figure["n"]:
                continue
            value = {**figure, "value": figure["difference"]}
            p_value = "-" if figure["p_value"] is None else f"{figure['p_value']:.3f}"
            test = figure.get("mcnemar")
            exact = (
                [f"{test['p_value']:.3g}", f"{test['only_a']:,} / {test['only_b']:,}"]
                if test
                else ["", ""]
            )
            rows.append([title, name, cell(value), p_value, *exact, f"{figure['n']:,}"])
    pairs = next(iter(comparison.values()))["pairs"]
    return [
        *align_columns(rows),
        f"{pairs:,} items are in both files; points and p: paired bootstrap of whole images; "
        "McNemar: exact, item by item",
    ]
