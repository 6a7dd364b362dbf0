"""The few-shot curve: means over draws with intervals, as a table and as a picture.

In: hits of every test image by method, shots and draw. Out: figures in percent, text, SVG.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray

from clover.core.terminal import align_columns

Hits = Mapping[tuple[str, int, int], Sequence[int]]
"""(method, shots, seed) -> 1 or 0 for each test image."""

_DRAWS = 1000
_COLOURS = ("#0b6e4f", "#b3541e", "#5b4b8a", "#8a6d1b", "#5f6b76", "#a23b72")
_WIDTH, _HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 24, 24, 104


def summarise(
    hits: Hits,
    *,
    methods: Sequence[str],
    shots: Sequence[int],
    seeds: int,
    groups: Sequence[str],
    ours: str,
) -> dict[str, Any]:
    """Return accuracy by method and shots: value, low, high (95 %), and ours minus the others.

    The interval draws whole groups of test images, and draws of shots, with replacement; the same
    for all methods, so that differences are paired.

    Args:
        hits: Of each fit.
        methods: In the order they are shown.
        shots: Images a class.
        seeds: Draws of each.
        groups: Of each test image.
        ours: The method the others are compared with.
    """
    names, codes = np.unique(np.array(groups), return_inverse=True)
    random = np.random.default_rng(0)
    weights = np.stack(
        [
            np.bincount(random.integers(0, len(names), len(names)), minlength=len(names))[codes]
            for _ in range(_DRAWS)
        ]
    ).astype(float)  # [draws, M]
    weights /= weights.sum(axis=1, keepdims=True)
    drawn = (
        np.stack(
            [np.bincount(random.integers(0, seeds, seeds), minlength=seeds) for _ in range(_DRAWS)]
        )
        / seeds
    )  # [draws, S]
    curve: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    minus: dict[str, list[dict[str, Any]]] = {m: [] for m in methods if m != ours}
    for count in shots:
        table = {
            method: np.array([hits[method, count, seed] for seed in range(seeds)], dtype=float)
            for method in methods
        }  # [S, M] each
        for method, right in table.items():
            by_seed = [round(100 * float(value), 2) for value in right.mean(axis=1)]
            curve[method].append(
                {**_figure(right, weights, drawn), "shots": count, "seeds": by_seed}
            )
            if method != ours:
                figure = _figure(table[ours] - right, weights, drawn)
                minus[method].append({**figure, "shots": count})
    return {"curve": curve, f"{ours} minus": minus, "shots": list(shots), "seeds": seeds}


def _figure(
    values: NDArray[np.float64], weights: NDArray[np.float64], drawn: NDArray[np.float64]
) -> dict[str, Any]:
    means = np.einsum("ds,sm,dm->d", drawn, values, weights)
    low, high = np.percentile(means, (2.5, 97.5))
    return {
        "value": round(100 * float(values.mean()), 2),
        "low": round(100 * float(low), 2),
        "high": round(100 * float(high), 2),
    }


def curve_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the curve as an aligned table, percent with 95 % intervals."""
    rows = [["shots a class", *map(str, result["shots"])]]
    for name, points in result["curve"].items():
        rows.append(
            [name, *(f"{p['value']:.1f} [{p['low']:.1f}, {p['high']:.1f}]" for p in points)]
        )
    for title, others in result.items():
        if title.endswith(" minus"):
            for name, points in others.items():
                shown = (f"{p['value']:+.1f} [{p['low']:+.1f}, {p['high']:+.1f}]" for p in points)
                rows.append([f"{title} {name}", *shown])
    return align_columns(rows)


def chart(result: Mapping[str, Any]) -> str:
    """Return the curve as a standalone SVG: accuracy over shots, in steps of doubling."""
    shots, curve = result["shots"], result["curve"]
    lowest = min(point["low"] for points in curve.values() for point in points)
    floor = min(90.0, max(0.0, 10 * float(np.floor(lowest / 10))))
    inner = _WIDTH - _LEFT - _RIGHT

    def x_at(place: int, shift: float = 0.0) -> float:
        return _LEFT + 20 + (inner - 40) * (place / max(1, len(shots) - 1)) + shift

    def y_at(value: float) -> float:
        return float(_TOP + (_HEIGHT - _TOP - _BOTTOM) * (100 - value) / (100 - floor))

    parts = []
    for value in np.arange(floor, 100.1, 10):
        y = y_at(float(value))
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.0f}</text>')
    for place, count in enumerate(shots):
        y = _HEIGHT - _BOTTOM + 18
        parts.append(f'<text x="{x_at(place):.1f}" y="{y}" text-anchor="middle">{count}</text>')
    for index, (name, points) in enumerate(curve.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        shift = 3.0 * (index - (len(curve) - 1) / 2)  # intervals stand side by side
        places = [(x_at(at, shift), point) for at, point in enumerate(points)]
        path = " ".join(f"{x:.1f},{y_at(point['value']):.1f}" for x, point in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, point in places:
            low, middle, high = (y_at(point[key]) for key in ("low", "value", "high"))
            title = f"{name}: {point['value']:.1f} [{point['low']:.1f}, {point['high']:.1f}]"
            parts.append(
                f'<g stroke="{colour}"><title>{escape(title)}</title>'
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
                f'<circle cx="{x:.1f}" cy="{middle:.1f}" r="2.5" fill="{colour}"/></g>'
            )
        column, row = index % 3, index // 3
        x, y = _LEFT + column * 190, _HEIGHT - _BOTTOM + 62 + row * 20
        parts.append(f'<rect x="{x}" y="{y - 9}" width="14" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20}" y="{y - 3}">{escape(name)}</text>')
    middle = _LEFT + inner / 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - _BOTTOM + 38}" text-anchor="middle">'
        "labelled images a class</text>"
    )
    parts.append(
        f'<text x="16" y="{_TOP + 100}" text-anchor="middle" '
        f'transform="rotate(-90 16 {_TOP + 100})">accuracy, percent</text>'
    )
    label = f"Few-shot accuracy of {', '.join(curve)}; research use, not for diagnosis"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{escape(label)}">'
        "<style>text{font:12px system-ui,sans-serif;fill:#333}.grid{stroke:#ddd}</style>"
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>' + "".join(parts) + "</svg>\n"
    )
