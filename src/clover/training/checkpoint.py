"""Checkpoints that resume exactly: weights, optimiser, step and random state, written whole.

Only what learns is saved. Files are torch archives read with `weights_only=True`, which refuses
code; the declared set of tensors must agree exactly, so a missing key is an error, never a warning.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from clover.core.errors import CloverError
from clover.core.files import atomic_path

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8})\.pt$")
_TORN = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)


def save_checkpoint(
    folder: Path, *, step: int, module: nn.Module, optimizer: Optimizer, key: str, keep: int = 2
) -> Path:
    """Write the state after `step` optimiser steps; keep the last `keep` checkpoints."""
    path = folder / f"step-{step:08d}.pt"
    state = {
        "step": step,
        "key": key,
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    with atomic_path(path) as partial:
        torch.save(state, partial)
    for old in _sorted(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def clear_checkpoints(folder: Path) -> None:
    """Remove a finished stage's checkpoints: its product is written, and they weigh thrice it."""
    for path in _sorted(folder):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # absent, or somebody keeps a file of his own there
        folder.rmdir()


def _sorted(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*.pt") if _NAME.search(path.name))


def load_latest(folder: Path, *, module: nn.Module, optimizer: Optimizer, key: str) -> int:
    """Load the newest readable checkpoint; return its step, 0 when there is none.

    Raises:
        CloverError: the checkpoint was made by another recipe.
    """
    for path in reversed(_sorted(folder)):
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except _TORN:
            # Torn by a crash of the disk, not of ours: the one before it serves.
            _LOG.warning("%s cannot be read; continuing from the checkpoint before it", path)
            continue
        if state["key"] != key:
            raise CloverError(
                f"{path} was made with other settings; "
                "give the settings it was started with, or another --out"
            )
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random_cuda"])
        return int(state["step"])
    return 0
