"""What several seeds of one variant say of the same questions: means with intervals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks.figure import print_figure
from clover.evaluate.control import Rated, ratings
from clover.evaluate.interval import bootstrap_means, cluster_codes, interval

KINDS = (("closed", True), ("open_recall", False))


def read_ratings(predictions: Path) -> Rated:
    """Rate a predictions file by the strict rule."""
    lines = predictions.read_text(encoding="utf-8").splitlines()[1:]
    return ratings([json.loads(line) for line in lines])


def print_run(name: str, rated: Rated) -> None:
    """Print closed accuracy and open recall of one run."""
    for kind, is_closed in KINDS:
        values = [value for closed, value, _ in rated.values() if closed == is_closed]
        print_figure(f"{name}/{kind}", 100 * float(np.mean(values)), "%", n=len(values))


def print_mean(name: str, runs: list[Rated], beside: list[Rated] | None = None) -> None:
    """Print the mean over seeds with its 95 % interval over images.

    Args:
        name: Of the figures.
        runs: One a seed, of the same questions.
        beside: Another variant's runs: the difference is printed, paired by question.
    """
    for kind, is_closed in KINDS:
        ids = [item for item, (closed, _, _) in runs[0].items() if closed == is_closed]
        values = np.array([[np.mean([run[item][1] for run in runs])] for item in ids])
        if beside is not None:
            values -= np.array([[np.mean([run[item][1] for run in beside])] for item in ids])
        codes = cluster_codes([runs[0][item][2] for item in ids])
        low, high = interval(bootstrap_means(values, codes, draws=1000)[:, 0])
        seeds = [100 * float(np.mean([run[item][1] for item in ids])) for run in runs]
        more = {} if beside is not None else {"seeds": [round(value, 1) for value in seeds]}
        print_figure(
            f"{name}/{kind}",
            100 * float(values.mean()),
            "%" if beside is None else "points",
            low=None if low is None else round(100 * low, 1),
            high=None if high is None else round(100 * high, 1),
            n=len(ids),
            **more,
        )
