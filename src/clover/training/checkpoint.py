"""Checkpoints that resume exactly: weights, optimiser, step and random state, written whole.

Of several processes the first one writes, for all of them, and all read.

Only what learns is saved. Files are torch archives read with `weights_only=True`, which refuses
code; the declared set of tensors must agree exactly, so a missing key is an error, never a warning.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from clover.core.errors import CloverError
from clover.core.files import atomic_path
from clover.training import processes
from clover.training.background import BackgroundWriter

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8})\.pt$")
_NAMED, _SHOWN = 4, 40
"""Settings that a refusal names, and characters of each."""
TORN = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)
"""What reading a torn archive raises."""


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    module: nn.Module,
    optimizer: Optimizer,
    key: str,
    settings: Mapping[str, str] | None = None,
    keep: int = 2,
    writer: BackgroundWriter | None = None,
) -> Path:
    """Write the state after `step` optimiser steps; keep the last `keep` checkpoints.

    Args:
        folder: Of the stage.
        step: How many optimiser steps are done.
        module: What learns.
        optimizer: Of the module.
        key: Fingerprint of all that changes the mathematics.
        settings: What went into the key, by name, so that a refusal can say what differs.
        keep: How many checkpoints stay.
        writer: Writes a copy of the state while training goes on; the copy takes a checkpoint's
            bytes in memory.
    """
    path = folder / f"step-{step:08d}.pt"
    state = {
        "step": step,
        "key": key,
        "settings": dict(settings or {}),
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        **_random_state(),
    }
    if not processes.is_first():
        return path
    if writer is None:
        _write(state, path, keep)
    else:
        writer.start(partial(_write, _copied(state), path, keep))
    return path


def _write(state: dict[str, Any], path: Path, keep: int) -> None:
    with atomic_path(path) as unfinished:
        torch.save(state, unfinished)
    for old in _sorted(path.parent)[:-keep]:
        old.unlink(missing_ok=True)


def _copied(state: Any) -> Any:
    """Return a state whose tensors training cannot change any more."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: _copied(item) for name, item in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_copied(item) for item in state)
    return state


def clear_checkpoints(folder: Path) -> None:
    """Remove a finished stage's checkpoints: its product is written, and they weigh thrice it."""
    for path in (*_sorted(folder), folder / "best.pt"):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # absent, or somebody keeps a file of his own there
        folder.rmdir()


def clear_unfinished(folder: Path) -> None:
    """Remove what a killed process was writing: nobody reads it, and each is a whole checkpoint."""
    for path in (*folder.glob(".step-*.part"), *folder.glob(".best.pt.*part")):
        path.unlink(missing_ok=True)


def _sorted(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*.pt") if _NAME.search(path.name))


def load_latest(
    folder: Path,
    *,
    module: nn.Module,
    optimizer: Optimizer,
    key: str,
    settings: Mapping[str, str] | None = None,
) -> int:
    """Load the newest readable checkpoint; return its step, 0 when there is none.

    Raises:
        CloverError: the checkpoint was made by another recipe; what differs is named.
    """
    for path in reversed(_sorted(folder)):
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except TORN:
            # Torn by a crash of the disk, not of ours: the one before it serves.
            _LOG.warning("%s cannot be read; continuing from the checkpoint before it", path)
            continue
        if state["key"] != key:
            differing = _differing(state.get("settings", {}), settings or {})
            raise CloverError(
                f"{path} was made with other settings{differing}; "
                "give the settings it was started with, or another --out"
            )
        try:
            module.load_state_dict(state["module"])
        except RuntimeError as error:
            raise CloverError(
                f"{path} was saved by another version of clover, whose tensors differ; finish with "
                f"that version, or delete {folder} to begin this stage again"
            ) from error
        optimizer.load_state_dict(state["optimizer"])
        _restore_random(state)
        return int(state["step"])
    return 0


def start_own_random() -> None:
    """Part from the random state that all processes share: each its own, the first one keeps it."""
    if processes.rank() > 0:
        shared = int(torch.randint(2**62, ()))
        own = np.random.SeedSequence([shared, processes.rank()]).generate_state(1, np.uint64)
        torch.manual_seed(int(own[0] >> np.uint64(1)))


def _random_state() -> dict[str, Any]:
    """Return torch's random state, and that of each further process in the order of ranks."""
    has_cuda = torch.cuda.is_available()
    if processes.num_processes() == 1:
        cuda = torch.cuda.get_rng_state_all() if has_cuda else []
        return {"random": torch.get_rng_state(), "random_cuda": cuda}
    # A process draws on its own GPU alone; asking for the others' would take memory on them.
    own = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if has_cuda else [])]
    gathered = [processes.gather_rows(item[None]) for item in own]
    ranks = [[states[rank].clone() for states in gathered] for rank in range(len(gathered[0]))]
    return {"random": ranks[0][0], "random_cuda": ranks[0][1:], "random_others": ranks[1:]}


def _restore_random(state: Mapping[str, Any]) -> None:
    """Go on with this process's random numbers.

    Saved by more or by fewer processes than there are now, all but the first start new ones.
    """
    others = state.get("random_others", [])
    is_own = processes.rank() > 0 and len(others) + 1 == processes.num_processes()
    first = [state["random"], *state["random_cuda"]]
    cpu, *cuda = others[processes.rank() - 1] if is_own else first
    torch.set_rng_state(cpu)
    if cuda and torch.cuda.is_available():
        if processes.num_processes() == 1:
            torch.cuda.set_rng_state_all(cuda)
        else:
            torch.cuda.set_rng_state(cuda[0])
    if not is_own:
        start_own_random()


def _differing(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return which settings differ, ` (align.seed was 1, is 2)`, or nothing where none is known."""
    if not before or not now:
        return ""
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    said = [
        f"{name} was {_short(before.get(name))}, is {_short(now.get(name))}"
        for name in names[:_NAMED]
    ]
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f" ({', '.join(said)}{more})" if said else ""


def _short(value: str | None) -> str:
    if value is None:
        return "not set"
    return value if len(value) <= _SHOWN else f"{value[: _SHOWN - 1]}…"
