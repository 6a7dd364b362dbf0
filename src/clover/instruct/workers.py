"""Where shards are worked on: in processes of this machine, or under Ray; both run one function."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from clover.core.errors import CloverError
from clover.instruct.shard import Shard, ShardResult, generate_shard


def run_locally(shards: list[Shard], workers: int) -> Iterator[tuple[Shard, ShardResult]]:
    """Run shards in processes on this machine.

    A program of your own that calls this needs the usual ``if __name__ == "__main__"``.

    Raises:
        CloverError: a process died.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        flying = {pool.submit(generate_shard, shard): shard for shard in shards}
        try:
            for future in as_completed(flying):
                yield flying[future], future.result()
        except BrokenProcessPool as error:
            raise CloverError(
                "a worker process died (out of memory?); what arrived is kept, the same command "
                "continues, with fewer --workers if need be"
            ) from error


def _end_with_parent() -> None:
    """End this process when the one that started it is killed: nobody else would stop it."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_under_ray(shards: list[Shard], workers: int) -> Iterator[tuple[Shard, ShardResult]]:
    """Run shards under Ray Data: on the cluster of RAY_ADDRESS, or in a local Ray of so many CPUs.

    Raises:
        CloverError: Ray is not installed, cannot be reached, or lost a worker.
    """
    ray = import_ray()
    is_ours = not ray.is_initialized()
    try:
        if is_ours:
            _start(ray, workers)
        ray.data.DataContext.get_current().enable_progress_bars = False
        # What passes through Ray is the number of a shard; its captions are in a file.
        numbers = [{"number": number} for number in range(len(shards))]
        rows = ray.data.from_items(numbers, override_num_blocks=len(shards))
        at_once = ray.data.TaskPoolStrategy(size=workers)
        for row in rows.map(_numbered(shards), compute=at_once).iter_rows():
            yield shards[row["number"]], ShardResult(row["stopped"], row["error"])
    except ray.exceptions.RayError as error:
        first = (str(error).splitlines() or ["no reason"])[0]
        raise CloverError(
            f"a worker failed under Ray ({type(error).__name__}: {first[:160]}); what arrived is "
            "kept, the same command continues"
        ) from error
    finally:
        if is_ours:
            ray.shutdown()


def _start(ray: Any, workers: int) -> None:
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(log_to_driver=False, logging_level="error")
        else:
            quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
            ray.init(address="local", num_cpus=workers, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CloverError(
            f"no Ray at {address or 'this machine'} ({first[:160]}); set RAY_ADDRESS to a cluster, "
            "or leave --ray out to use processes on this machine"
        ) from error


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


def _numbered(shards: list[Shard]) -> Callable[[dict[str, int]], dict[str, int | str]]:
    def run(row: dict[str, int]) -> dict[str, int | str]:
        return {**row, **dataclasses.asdict(generate_shard(shards[row["number"]]))}

    return run
