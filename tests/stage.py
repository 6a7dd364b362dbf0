"""Either stage, by its name, on the tiny data."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from clover.align.run import align
from clover.core.config import Recipe
from clover.tune.run import tune
from tiny import Tiny

Stage = Literal["align", "tune"]
STAGES: tuple[Stage, ...] = ("align", "tune")


def run_stage(
    stage: Stage,
    tiny: Tiny,
    out: Path,
    *,
    recipe: Recipe | None = None,
    max_steps: int | None = None,
) -> Path:
    """Run one stage in `out`; return the file of its weights."""
    chosen = recipe or tiny.recipe
    cache = tiny.folder / "cache"
    if stage == "align":
        align(chosen, captions=tiny.captions, out=out, cache=cache, max_steps=max_steps)
        return out / "align.safetensors"
    tune(
        chosen,
        instructions=tiny.instructions,
        out=out / "model",
        run=out,
        cache=cache,
        max_steps=max_steps,
    )
    return out / "model" / "bridge.safetensors"
