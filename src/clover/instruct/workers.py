"""Where shards are worked on: in processes of this machine, or under Ray; both run one function."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from clover.core.cluster import under_ray
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

    def work(number: int) -> dict[str, str]:
        return dataclasses.asdict(generate_shard(shards[number]))

    for number, row in under_ray(work, len(shards), workers=workers):
        yield shards[number], ShardResult(**row)
