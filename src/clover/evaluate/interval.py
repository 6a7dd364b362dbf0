"""Intervals and paired comparisons that know that the questions of one image hang together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clover.core.errors import CloverError

Floats = NDArray[np.float64]

_BLOCK = 1 << 23
"""Cluster draws held at once: 32 MB as float32."""


def bootstrap_means(
    values: Floats, clusters: NDArray[np.int64], *, draws: int = 1000, seed: int = 0
) -> Floats:
    """Return bootstrapped means, drawing whole clusters with replacement.

    Args:
        values: [N, K]; NaN where a column has no value for a row.
        clusters: [N], the cluster of each row, 0..C-1.
        draws: Number of draws.
        seed: Of the draws; the same draws serve all columns.

    Returns:
        [draws, K]; NaN where a draw holds no value of a column.
    """
    num_clusters = int(clusters.max()) + 1
    present = ~np.isnan(values)
    columns = [
        np.bincount(clusters, weights=np.where(present[:, k], values[:, k], 0.0))
        for k in range(values.shape[1])
    ]
    # Most columns have values in the same rows: their counts are summed once.
    masks: dict[bytes, int] = {}
    place = []
    for k in range(values.shape[1]):
        key = present[:, k].tobytes()
        if key not in masks:
            masks[key] = len(columns)
            columns.append(np.bincount(clusters, weights=present[:, k]))
        place.append(masks[key])
    table = np.stack(columns, axis=1).astype(np.float32)  # [C, K + masks]
    rng = np.random.default_rng(seed)
    means = np.full((draws, values.shape[1]), np.nan)
    block = max(1, min(draws, _BLOCK // num_clusters))
    for start in range(0, draws, block):
        rows = min(block, draws - start)
        totals = _drawn_counts(rng, rows, num_clusters) @ table  # [rows, K + masks]
        counts = totals[:, place]
        np.divide(
            totals[:, : values.shape[1]], counts, out=means[start : start + rows], where=counts > 0
        )
    return means


def _drawn_counts(rng: np.random.Generator, rows: int, size: int) -> NDArray[np.float32]:
    """Return how often each of `size` clusters is drawn in `size` draws; [rows, size]."""
    counts = np.empty((rows, size), dtype=np.float32)
    for row in range(rows):
        counts[row] = np.bincount(rng.integers(0, size, size, dtype=np.int32), minlength=size)
    return counts


def interval(means: Floats) -> tuple[float, float] | tuple[None, None]:
    """Return the 2.5 and 97.5 percentiles of bootstrapped means [draws], or None twice."""
    known = means[~np.isnan(means)]
    if not len(known):
        return None, None
    low, high = np.percentile(known, (2.5, 97.5))
    return float(low), float(high)


def cluster_codes(names: Sequence[str]) -> NDArray[np.int64]:
    """Number the clusters by the order of their names, so that row order changes nothing."""
    order = {name: place for place, name in enumerate(sorted(set(names)))}
    return np.fromiter((order[name] for name in names), dtype=np.int64, count=len(names))


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise CloverError(
            f"a paired comparison needs two lists of one length, got {first.shape} and "
            f"{second.shape}; match them by id first"
        )
    return first, second, ~(np.isnan(first) | np.isnan(second))


def mcnemar(a: ArrayLike, b: ArrayLike) -> dict[str, Any]:
    """Test whether two lists of hits (1 or 0, NaN left out) of the same items differ.

    Returns:
        n, both, only_a, only_b, neither, and the exact two-sided p_value (1 where they agree).

    Raises:
        CloverError: lists of different lengths.

    Source: McNemar 1947; the exact form is a binomial test of the discordant pairs.
    """
    from scipy.stats import binomtest

    first, second, known = _pair(a, b)
    left, right = first[known] == 1, second[known] == 1
    only_a, only_b = int((left & ~right).sum()), int((~left & right).sum())
    discordant = only_a + only_b
    p_value = float(binomtest(only_a, discordant).pvalue) if discordant else 1.0
    return {
        "n": int(known.sum()),
        "both": int((left & right).sum()),
        "only_a": only_a,
        "only_b": only_b,
        "neither": int((~left & ~right).sum()),
        "p_value": p_value,
    }


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    *,
    clusters: Sequence[str] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the difference a - b of two lists of fractions of the same items, in points.

    Args:
        a: Fractions 0..1 of the first model, NaN where there is none.
        b: Of the second, in the same order.
        clusters: The image of each item; without it each item stands alone.
        draws: Number of bootstrap draws.
        seed: Of the draws.

    Returns:
        difference, low, high (percentage points, 95 %), p_value (two-sided), n.

    Raises:
        CloverError: lists of different lengths.
    """
    first, second, known = _pair(a, b)
    n = int(known.sum())
    if not n:
        return {"difference": None, "low": None, "high": None, "p_value": None, "n": 0}
    difference = (first - second)[known]
    if clusters is None:
        codes = np.arange(n)
    else:
        codes = cluster_codes(
            [name for name, is_known in zip(clusters, known, strict=True) if is_known]
        )
    result: dict[str, Any] = {"difference": 100 * float(difference.mean()), "n": n}
    if len(np.unique(codes)) < 2:
        return {**result, "low": None, "high": None, "p_value": None}
    means = bootstrap_means(difference[:, None], codes, draws=draws, seed=seed)[:, 0]
    low, high = interval(means)
    # One is added above and below: no finite number of draws shows a probability of nought.
    beyond = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p_value = min(1.0, 2 * (beyond + 1) / (draws + 1))
    return {**result, "low": 100 * (low or 0.0), "high": 100 * (high or 0.0), "p_value": p_value}
