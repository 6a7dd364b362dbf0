"""Run a function in several processes that know each other, as `torchrun` would start them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clover.training import processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Return what `torchrun` tells a process."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), **where}


def run_together(work: Callable[[int], Any], folder: Path, *, size: int = 2) -> list[Any]:
    """Call `work(rank)` inside `joined` in `size` processes; return what each returned."""
    codes, errors = start_together(work, folder, size=size)
    assert not errors, "\n".join(errors)
    assert codes == [0] * size
    return [torch.load(folder / f"result-{rank}.pt") for rank in range(size)]


def start_together(
    work: Callable[[int], Any], folder: Path, *, size: int = 2
) -> tuple[list[int | None], list[str]]:
    """Do the same; return exit codes, and the tracebacks of those that raised."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    # Forked, so that tests may hand over functions, and torch is not imported anew.
    context = multiprocessing.get_context("fork")
    running = [
        context.Process(target=_child, args=(work, rank, size, port, folder))
        for rank in range(size)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(300)
        if process.is_alive():
            process.kill()
    errors = [path.read_text() for path in sorted(folder.glob("error-*.txt"))]
    return [process.exitcode for process in running], errors


def _child(work: Callable[[int], Any], rank: int, size: int, port: int, folder: Path) -> None:
    os.environ.update(environment(rank, size, port))
    torch.set_num_threads(1)
    try:
        with processes.joined("cpu"):
            torch.save(work(rank), folder / f"result-{rank}.pt")
    except Exception:
        (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
        raise
