"""The table the demo ends with: the paper's columns, with intervals and controls."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def _with_interval(figure: dict[str, Any]) -> str:
    if figure.get("value") is None:
        return "-"
    if figure.get("low") is None:
        return f"{figure['value']:.1f}"
    return f"{figure['value']:.1f} [{figure['low']:.1f}, {figure['high']:.1f}]"


def demo_table(scores: dict[str, Any], out: Path) -> list[str]:
    """Return the lines of the table: scores, controls, cost, and the command to go on with."""
    details = scores["details"]
    views, baselines = details["views"], details["baselines"]
    millions = details["trainable_parameters"] / 1e6
    rows = [("", "closed (accuracy)", "open (recall)")]
    names = {
        "image": f"CLOVER, {millions:.1f}M trainable",
        "blind": "  without the image",
        "shuffled": "  with another image",
        "noise": "  with a noise image",
    }
    for view, name in names.items():
        if view in views:
            found = views[view]
            rows.append(
                (name, _with_interval(found["closed"]), _with_interval(found["open_recall"]))
            )
    divided = details["per_log_parameters"]
    cells = [f"{divided[k]:.2f}" if k in divided else "-" for k in ("closed", "open_recall")]
    rows.insert(2, ("  / log10(millions)", cells[0], cells[1]))
    gains = details["gains"].get("blind")
    if gains:
        rows.insert(
            3,
            (
                "  image gain, points",
                _with_interval(gains["closed"]),
                _with_interval(gains["open"]),
            ),
        )
    if "colour_only" in baselines:
        colour = baselines["colour_only"]
        rows.append(
            (
                "colour alone",
                _with_interval(colour["closed"]),
                _with_interval(colour["open_recall"]),
            )
        )
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    lines = ["", "  ".join("─" * width for width in widths)]
    lines += [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines += [
        lines[1],
        f"{scores['num_closed']} closed and {scores['num_open']} open questions on fresh images; "
        f"rule {details['protocol']}; 95 % intervals over images",
        details["verdict"],
        f"{scores['seconds']:.0f} seconds and ${scores['dollars']:.2f} in all; "
        f"the page: {out / 'report.html'}",
        "Research use only, not for diagnosis.",
        "",
        "Talk to it:",
        f"  clover chat {out / 'model'} {out / 'phantom-validation' / 'images' / '00000.png'}",
    ]
    return lines
