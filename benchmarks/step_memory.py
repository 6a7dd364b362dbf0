"""Peak memory and time of a stage-1 step: plain, layers computed again, the batch in chunks.

    python -m benchmarks.step_memory [--pairs 32] [--steps 3] [--small]

Each way in a process of its own, at the published size (12 layers of 768, 32 queries, 257 x 1408
features, text at 32 tokens). Memory is the process's peak beyond what it held before its first
step: weights are not in it, gradients and AdamW's state are, alike in all. Time is processor time.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

import click
import torch

from benchmarks.figure import print_figure
from benchmarks.train_step import DECODE_START, PLACES, SIZES, TEXT
from clover.align.apart import backward_apart
from clover.align.cached import backward_in_chunks
from clover.align.losses import LossSettings
from clover.core.config import QFormerConfig
from clover.core.memory import keep_freed_memory
from clover.core.run import peak_memory_gib
from clover.qformer.bridge import Bridge
from clover.qformer.tokenizer import Tokens
from clover.training.loop import apply_gradients, make_optimizer

_WAYS = ("plain", "checkpoint_activations", "gradient_chunk", "both")


def child(way: str, size: str, pairs: int, steps: int) -> None:
    """Run some steps one way, and print what they took."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    keep_freed_memory()
    again = way in ("checkpoint_activations", "both")
    config = QFormerConfig(**SIZES[size], checkpoint_activations=again)  # type: ignore[arg-type]
    bridge = Bridge(config, has_alignment=True)
    features = torch.randn(pairs, PLACES, config.encoder_width)
    ids = torch.randint(1000, 30000, (pairs, TEXT))
    text = Tokens(ids, torch.ones_like(ids))
    optimizer = make_optimizer(bridge, learning_rate=1e-5, weight_decay=0.05)
    settings = LossSettings(DECODE_START)
    before, times = peak_memory_gib(), []
    for _ in range(steps):
        begun = time.process_time()
        if way in ("gradient_chunk", "both"):
            backward_in_chunks(bridge, features, text, settings, chunk=max(2, pairs // 4))
        else:
            backward_apart(bridge, features, text, settings)
        apply_gradients(optimizer, torch.tensor(1.0), clip_norm=1.0)
        times.append(time.process_time() - begun)
    found = {"gib": peak_memory_gib() - before, "seconds": statistics.median(times)}
    print(json.dumps(found))


@click.command()
@click.option("--pairs", default=32, show_default=True)
@click.option("--steps", default=3, show_default=True)
@click.option("--small", is_flag=True, help="A small size, to see that it runs.")
@click.option("--way", type=click.Choice(_WAYS), hidden=True)
def main(pairs: int, steps: int, small: bool, way: str | None) -> None:
    """Print one figure a way, beside the plain one."""
    size = "small" if small else "published"
    if way is not None:
        child(way, size, pairs, steps)
        return
    plain: dict[str, float] = {}
    for name in _WAYS:
        command = [sys.executable, "-m", "benchmarks.step_memory", "--way", name]
        command += ["--pairs", str(pairs), "--steps", str(steps), *(["--small"] if small else [])]
        found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        plain = plain or found
        print_figure(
            f"stage-1 step's memory, {name}", found["gib"], "GiB", pairs=pairs, size=size,
            peer="plain", ratio=round(found["gib"] / plain["gib"], 3),
            seconds=round(found["seconds"], 3),
            time_ratio=round(found["seconds"] / plain["seconds"], 3),
        )  # fmt: skip


if __name__ == "__main__":
    main()
