"""The table an evaluation ends with: the paper's columns, with intervals, controls, baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clover.core.terminal import align_columns

_VIEWS = {
    "blind": "without the image",
    "shuffled": "with another image",
    "noise": "with a noise image",
    "grey": "in grey",
    "stain": "stains shifted",
    "jpeg": "compressed",
    "turned": "turned by a quarter",
    "mirrored": "mirrored",
    "paraphrase": "in other words",
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
    trained = details["trainable_parameters"]
    name = details["model"] if trained is None else f"CLOVER, {trained / 1e6:.1f}M trainable"
    rows = [("", "closed (accuracy)", "open (recall)")]
    rows.append(_row(name, views["image"]))
    if trained is not None:
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
    lines = _ruled(rows)
    return [
        *lines,
        f"{scores['num_closed']} closed and {scores['num_open']} open questions, rule "
        f"{details['protocol']}, 95 % intervals over images",
        details["verdict"],
        *details.get("remarks", []),
        *([details["unfamiliar"]["sentence"]] if details.get("unfamiliar") else []),
        *(f"Exposed as {charge['sentence']}." for charge in details["exposed"]["charges"]),
    ]


def control_lines(scores: Mapping[str, Any]) -> list[str]:
    """Return the controls as one table: what each costs, and how many answers stay the same."""
    details = scores["details"]
    rows = [("", "closed, points lost", "open, points lost", "answers that stay, %", "asked")]
    for view, found in details["gains"].items():
        stay = details["stay"][view]
        rows.append(
            (
                _VIEWS[view],
                with_interval(found["closed"]),
                with_interval(found["open"]),
                with_interval(stay),
                f"{stay['n']:,}",
            )
        )
    return _ruled(rows) if len(rows) > 1 else []


def form_lines(scores: Mapping[str, Any]) -> list[str]:
    """Return a line for each question form: with the image, without, and what it is worth."""
    rows: list[tuple[str, ...]] = [("question form", "n", "with image", "blind", "gain, points")]
    for name, found in scores["details"]["forms"].items():
        if "gain" in found:
            shown = f"{found['image']:.1f}", f"{found['blind']:.1f}"
            rows.append((name[:48], f"{found['n']:,}", *shown, with_interval(found["gain"])))
    return _ruled(rows) if len(rows) > 1 else []


def _ruled(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as aligned lines between two rules."""
    body = align_columns(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = "  ".join("─" * width for width in widths)
    return [rule, *body, rule]
