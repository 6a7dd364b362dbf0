"""Work under Ray: in a local one, or on the cluster that `RAY_ADDRESS` names (extra `[ray]`)."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

from clover.core.errors import CloverError


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
        first = (str(error).splitlines() or ["no reason"])[0]
        raise CloverError(
            f"a worker failed under Ray ({type(error).__name__}: {first[:160]}); what arrived is "
            "kept, the same command continues"
        ) from error
    finally:
        if is_ours:
            ray.shutdown()


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
    except (OSError, RuntimeError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CloverError(
            f"no Ray at {address or 'this machine'} ({first[:160]}); set RAY_ADDRESS to a cluster, "
            "or leave --ray out to use processes on this machine"
        ) from error
