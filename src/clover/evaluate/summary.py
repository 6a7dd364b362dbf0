"""The table an evaluation ends with: the paper's columns, with intervals, controls, baselines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_VIEWS = {
    "blind": "without the image",
    "shuffled": "with another image",
    "noise": "with a noise image",
}
_BASELINES = {
    "question_only": "question alone",
    "colour_only": "colour alone",
    "linear_probe": "linear probe, same features",
}


def with_interval(figure: Mapping[str, Any]) -> str:
    """Return ``93.1 [91.0, 95.2]``, or a dash."""
    if figure.get("value") is None:
        return "-"
    if figure.get("low") is None:
        return f"{figure['value']:.1f}"
    return f"{figure['value']:.1f} [{figure['low']:.1f}, {figure['high']:.1f}]"


def _row(name: str, figures: Mapping[str, Any]) -> tuple[str, str, str]:
    return name, with_interval(figures["closed"]), with_interval(figures["open_recall"])


def evaluation_lines(scores: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table and the sentence that says whether the model looks."""
    details = scores["details"]
    views, divided = details["views"], details["per_log_parameters"]
    millions = details["trainable_parameters"] / 1e6
    rows = [("", "closed (accuracy)", "open (recall)")]
    rows.append(_row(f"CLOVER, {millions:.1f}M trainable", views["image"]))
    cells = [f"{divided[k]:.2f}" if k in divided else "-" for k in ("closed", "open_recall")]
    rows.append(("  / log10(millions)", cells[0], cells[1]))
    gain = details["gains"].get("blind")
    if gain:
        rows.append(
            ("  image gain, points", with_interval(gain["closed"]), with_interval(gain["open"]))
        )
    rows += [_row(f"  {name}", views[view]) for view, name in _VIEWS.items() if view in views]
    baselines = details["baselines"]
    rows += [_row(name, baselines[key]) for key, name in _BASELINES.items() if key in baselines]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    rule = "  ".join("─" * width for width in widths)
    body = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return [
        rule,
        *body,
        rule,
        f"{scores['num_closed']} closed and {scores['num_open']} open questions, rule "
        f"{details['protocol']}, 95 % intervals over images",
        details["verdict"],
    ]
