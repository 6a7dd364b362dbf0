"""The few-shot curve: means over draws with intervals, as a table and as a picture.

In: hits of every test image by method, shots and draw. Out: figures in percent, text, SVG.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clover.core.chart import Series, line_chart, standalone
from clover.core.terminal import align_columns

Hits = Mapping[tuple[str, int, int], Sequence[int]]
"""(method, shots, seed) -> 1 or 0 for each test image."""

_DRAWS = 1000


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
    curve = result["curve"]
    lowest = min(point["low"] for points in curve.values() for point in points)
    series = [
        Series(
            name,
            [(at, point["value"]) for at, point in enumerate(points)],
            [(point["low"], point["high"]) for point in points],
        )
        for name, points in curve.items()
    ]
    return standalone(
        line_chart(
            series,
            title="Few-shot accuracy, research use, not for diagnosis",
            x_label="labelled images a class",
            y_label="accuracy, percent",
            places=[str(count) for count in result["shots"]],
            floor=10 * math.floor(lowest / 10),
        )
    )
