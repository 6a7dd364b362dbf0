"""One JSON line a figure, with the machine it was measured on."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence

from clover.core.run import machine


def print_figure(name: str, value: float, unit: str, **details: object) -> None:
    """Print one figure."""
    row = {"figure": name, "value": round(value, 4), "unit": unit, **details}
    print(json.dumps({**row, "machine": machine()}), flush=True)


def seconds(function: Callable[[], object], *, runs: int = 5) -> float:
    """Return the median seconds of a call, after one that is not counted."""
    function()
    return statistics.median(_timed(function) for _ in range(runs))


def alternating(
    functions: Sequence[Callable[[], object]],
    *,
    runs: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Return the median seconds of each function, called in turn so that noise hits all alike.

    `time.thread_time` as clock leaves out what others on the same core took; it counts one thread.
    """
    for function in functions:
        function()
    found: list[list[float]] = [[] for _ in functions]
    for _ in range(runs):
        for times, function in zip(found, functions, strict=True):
            times.append(_timed(function, clock))
    return [statistics.median(times) for times in found]


def _timed(function: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    function()
    return clock() - start
