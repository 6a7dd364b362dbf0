"""The run folder: the resolved recipe, metrics, checkpoints and the bill.

`recipe.yaml` + `metrics.jsonl` + `checkpoints/` + `costs.json` are enough to resume, to repeat and
to argue about.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clover.core.errors import CloverError
from clover.core.files import growing, read_json, write_json, write_text

LOCK = ".lock"
"""Of a folder in which a process trains (`files.held`)."""


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def peak_memory_gib() -> float:
    """Return this process's largest resident set so far, in GiB; 0 where nobody counts it."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def machine() -> dict[str, Any]:
    """Describe this machine: processor, cores, device, versions that change numbers."""
    import torch
    import transformers

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    return {
        "system": platform.platform(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def num_processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Let the collector of cycles rest: records and items make none, and it looks through all.

    Of 100,000 records it takes more time than reading them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class RunFolder:
    """A folder that holds one run; opening it again continues it.

    Args:
        path: Made when absent.
        is_writer: Whether recipe, metrics and bill are written: not by every one of several
            processes that work on one run.
    """

    def __init__(self, path: str | Path, *, is_writer: bool = True) -> None:
        self.path = Path(path)
        self._is_writer = is_writer
        self.path.mkdir(parents=True, exist_ok=True)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.path / "checkpoints"

    def save_recipe(self, recipe: Any, *, replaces: bool = True) -> None:
        """Write the resolved recipe (a `clover.core.config.Recipe`).

        Args:
            recipe: The recipe.
            replaces: Also where there is one: not before it is known that the run goes on with it.
        """
        path = self.path / "recipe.yaml"
        if self._is_writer and (replaces or not path.exists()):
            write_text(path, recipe.to_yaml())

    def log(self, stage: str, step: int, **values: float | int | str) -> None:
        """Append one line to `metrics.jsonl`."""
        if not self._is_writer:
            return
        row = {"stage": stage, "step": step, "time": round(time.time(), 3), **values}
        line = json.dumps(row, allow_nan=False) + "\n"
        path = self.path / "metrics.jsonl"
        with growing(path), path.open("ab+") as out:
            # A crash may have torn the last line; the next one must not be glued to it.
            if out.tell() > 0:
                out.seek(-1, os.SEEK_END)
                line = line if out.read(1) == b"\n" else "\n" + line
            out.write(line.encode())

    def metrics(self, stage: str | None = None) -> list[dict[str, Any]]:
        """Return the logged lines, of one stage or all; a torn last line is passed over.

        A resumed run logs again what it repeats: the last line of a (stage, step) counts.
        """
        path = self.path / "metrics.jsonl"
        rows: dict[tuple[str, int], dict[str, Any]] = {}
        if path.exists():
            for text in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    row = json.loads(text)
                    rows[row["stage"], row["step"]] = row
        return [row for row in rows.values() if stage is None or row["stage"] == stage]

    def costs(self) -> list[dict[str, Any]]:
        """Return the bill so far: one entry a stage."""
        path = self.path / "costs.json"
        entries: list[dict[str, Any]] = read_json(path)["stages"] if path.exists() else []
        return entries

    def account(self, stage: str, *, seconds: float, dollars: float = 0.0, **details: Any) -> None:
        """Add a stage's seconds and dollars to the bill; a stage run in parts adds up."""
        if not self._is_writer:
            return
        entries = self.costs()
        entry = next((item for item in entries if item["stage"] == stage), None)
        if entry is None:
            entry = {"stage": stage, "seconds": 0.0, "dollars": 0.0}
            entries.append(entry)
        entry["seconds"] = round(entry["seconds"] + seconds, 3)
        entry["dollars"] = round(entry["dollars"] + dollars, 6)
        entry["peak_memory_gib"] = round(peak_memory_gib(), 2)
        entry.update(details)
        total = {
            key: round(sum(item[key] for item in entries), 6) for key in ("seconds", "dollars")
        }
        write_json(self.path / "costs.json", {"total": total, "stages": entries})

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[dict[str, Any]]:
        """Time the block and put it on the bill, also when it is interrupted.

        Yields:
            A dictionary; what is put there (for instance `dollars`) goes on the bill too.
        """
        start = time.perf_counter()
        details: dict[str, Any] = {}
        try:
            yield details
        except BaseException:
            # A full disk takes no bill either; what failed first is what the user must read.
            with contextlib.suppress(CloverError):
                self.account(stage, seconds=time.perf_counter() - start, **details)
            raise
        self.account(stage, seconds=time.perf_counter() - start, **details)
