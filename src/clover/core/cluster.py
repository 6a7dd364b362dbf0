"""Work under Ray: in a local one, or on the cluster that `RAY_ADDRESS` names (extra `[ray]`)."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from clover.core.errors import CloverError

_COLOURS = re.compile("\x1b\\[[0-9;]*m")


def import_ray() -> Any:
    """Return the module `ray`.

    Raises:
        CloverError: it is not installed.
    """
    # Closed networks, and captions that are nobody else's business: Ray is not to call home.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise CloverError(
            f"--ray needs Ray, which is not installed ({error}): pip install "
            "'clover-pathology[ray]', or leave --ray out to use processes on this machine"
        ) from error
    # Progress is the caller's to show.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray


def under_ray(
    work: Callable[[int], dict[str, Any]],
    count: int,
    *,
    workers: int,
    cpus: int = 1,
    shares_gpus: bool = False,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Do numbered pieces of work under Ray Data; yield each one's number and result as it ends.

    Args:
        work: Makes plain values, by name, of a piece's number. What passes through Ray is these;
            the rest is in files.
        count: How many pieces there are.
        workers: Pieces at a time; also the CPUs of a local Ray, times `cpus`.
        cpus: Of the machine, for each.
        shares_gpus: Whether the workers divide the GPUs among them, where there are any.

    Raises:
        CloverError: Ray is not installed, cannot be reached, or lost a worker.
    """
    ray = import_ray()
    is_ours = not ray.is_initialized()

    def run(row: dict[str, int]) -> dict[str, Any]:
        return {**row, **work(row["number"])}

    try:
        if is_ours:
            _start(ray, workers * cpus)
        gpus = _gpus_each(ray.cluster_resources().get("GPU", 0), workers) if shares_gpus else 0
        ray.data.DataContext.get_current().enable_progress_bars = False
        numbers = [{"number": number} for number in range(count)]
        rows = ray.data.from_items(numbers, override_num_blocks=count)
        at_once = ray.data.TaskPoolStrategy(size=workers)
        done = rows.map(run, compute=at_once, num_cpus=cpus, num_gpus=gpus or None)
        for row in done.iter_rows():
            yield row.pop("number"), row
    except ray.exceptions.RayError as error:
        raise CloverError(
            f"a worker failed under Ray ({type(error).__name__}: {_reason(error)}); what arrived "
            "is kept, the same command continues"
        ) from error
    finally:
        if is_ours:
            ray.shutdown()


def _reason(error: Exception) -> str:
    """Return what an error of Ray's says in one line, without a terminal's colours.

    A task's error shows the worker's trace, whose last line is the reason; others begin with it.
    """
    lines = [line for line in _COLOURS.sub("", str(error)).splitlines() if line.strip()]
    if not lines:
        return "no reason given"
    return lines[-1 if lines[0].startswith("ray::") else 0].strip()[:160]


def _gpus_each(gpus: float, workers: int) -> float:
    """Return a worker's share of the GPUs: one each, or a part that lets all of them run."""
    return 1 / math.ceil(workers / gpus) if gpus else 0


def _start(ray: Any, cpus: int) -> None:
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(log_to_driver=False, logging_level="error")
        else:
            quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
            ray.init(address="local", num_cpus=cpus, **quiet)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        advice = "set RAY_ADDRESS to a cluster"
        if address:
            advice = "check RAY_ADDRESS, and RAY_AUTH_MODE and RAY_AUTH_TOKEN if it asks for them"
        raise CloverError(
            f"no Ray at {address or 'this machine'} ({_reason(error)}); {advice}, or leave --ray "
            "out to use processes on this machine"
        ) from error
