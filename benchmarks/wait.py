"""How long a training step waits for its features: reading a batch against computing its step.

    python -m benchmarks.wait [--size demo] [--steps 8]

Stage 1 as `clover align` runs it: records and tokens of a batch are read (`AlignObjective.collate`)
and then losses, gradients, clipping and AdamW computed. "demo": 32 pairs of 196 x 272, the phantom
recipe's bridge. "published": 8 pairs of 257 x 1408, the published bridge. Each batch is read twice:
the first time after the system was asked to forget the shards' pages (the disk is read; a virtual
one may remember more than it says), then once more (warm). Every other batch is announced two
steps before, as training does, the others not at all (cold). By the clock, since waiting for a disk
takes no processor time: on a core that others share both sides are slower. The share of the
processor time is printed beside it.

The share is reading / (reading + computing).
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import torch
from PIL import Image

from benchmarks.figure import print_figure
from benchmarks.train_step import SIZES
from clover.align.objective import AlignObjective
from clover.core.config import AlignConfig, EncoderConfig, QFormerConfig, load_recipe
from clover.model import load_tokenizer
from clover.qformer.bridge import Bridge
from clover.training.device import choose_device
from clover.training.loop import _AHEAD, apply_gradients, make_optimizer
from clover.training.sampler import Sampler
from clover.vision.cache import FeatureCache
from clover.vision.dataset import FeatureSet, load_feature_set
from clover.vision.encoder import TinyEncoder
from clover.vision.storage import Storage, pack

_CAPTION = (
    "H&E-stained section of colon, case {}: crowded crypts with enlarged nuclei and necrosis."
)
_SHARD = 128
_SHAPES = {"demo": (32, 196, 272), "published": (8, 257, 1408), "small": (4, 5, 64)}
"""Pairs a batch, tokens an image, width."""


def prepare(
    folder: Path, images: int, places: int, width: int, *, storage: Storage = "float16"
) -> FeatureSet:
    """Write pairs and their features; return them opened, with no page of a shard in memory."""
    encoder = TinyEncoder(EncoderConfig(kind="tiny"))
    cache = FeatureCache(folder / "cache", encoder, storage=storage)
    keys = []
    with (folder / "captions.jsonl").open("w", encoding="utf-8") as out:
        for index in range(images):
            path = folder / f"{index}.png"
            Image.new("RGB", (8, 8), (index % 256, index // 256, 0)).save(path)
            keys.append(hashlib.sha256(path.read_bytes()).hexdigest())
            row = {"id": str(index), "image": path.name, "caption": _CAPTION.format(index)}
            out.write(json.dumps(row) + "\n")
    for start in range(0, images, _SHARD):
        part = keys[start : start + _SHARD]
        packed = [pack(torch.randn(1, places, width), storage) for _ in part]
        shard = cache.write(part, packed).path
        with shard.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return load_feature_set(
        folder / "captions.jsonl",
        needs="caption",
        encoder=encoder,
        cache=folder / "cache",
        storage=storage,
    )


class Times(NamedTuple):
    """Seconds by the clock, and of the processor."""

    clock: float
    processor: float


def _timed(function: Callable[[], object]) -> Times:
    start, used = time.perf_counter(), time.process_time()
    function()
    return Times(time.perf_counter() - start, time.process_time() - used)


def _share(reading: Sequence[float], computing: Sequence[float]) -> float:
    """Return the percentage; of reading the mean, since what is opened once belongs to it."""
    mean = statistics.mean(reading)
    return 100 * mean / (mean + statistics.median(computing))


def measure(size: str, steps: int, scratch: Path | None) -> None:
    """Print the share that reading has in a step, cold and warm."""
    torch.manual_seed(0)
    batch, places, width = _SHAPES[size]
    recipe = load_recipe("phantom")
    device = choose_device("cpu")
    if size == "demo":
        shape = recipe.qformer.model_copy(update={"encoder_width": width})
    else:
        shape = QFormerConfig(**SIZES[size])  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(prefix="clover-wait-", dir=scratch) as folder:
        data = prepare(Path(folder), steps * batch, places, width)
        bridge = Bridge(shape, has_alignment=True)
        objective = AlignObjective(bridge, data, load_tokenizer(recipe), AlignConfig(), device)
        optimizer = make_optimizer(bridge, learning_rate=1e-4, weight_decay=0.05)
        sampler = Sampler(len(data.records), batch, seed=0)
        cold: list[Times] = []
        ahead: list[Times] = []
        warm: list[Times] = []
        computing: list[Times] = []
        for step in range(sampler.batches_per_epoch):
            indices = sampler.batch(step)
            coming = step + _AHEAD
            if coming % 2 == 0 and coming < sampler.batches_per_epoch:
                objective.announce(sampler.batch(coming), [0] * batch)
            first = _timed(lambda rows=indices: objective.collate(rows))  # type: ignore[misc]
            if step >= _AHEAD:  # like beside like: the first ones open shards
                (cold if step % 2 else ahead).append(first)
            warm.append(_timed(lambda rows=indices: objective.collate(rows)))  # type: ignore[misc]
            read = objective.collate(indices)

            def compute(read: object = read) -> None:
                with device.autocast():
                    losses = objective.losses(read)  # type: ignore[arg-type]
                losses.sum.backward()  # type: ignore[no-untyped-call]
                apply_gradients(optimizer, losses.count, clip_norm=1.0)

            computing.append(_timed(compute))
    for name, times in (("cold", cold), ("announced", ahead), ("warm", warm)):
        print_figure(
            f"share of a stage-1 step that waits for its features, {size} size, {name}",
            _share([item.clock for item in times], [item.clock for item in computing]),
            "%",
            of_processor=round(
                _share([item.processor for item in times], [item.processor for item in computing]),
                4,
            ),
            read_ms=round(1000 * statistics.mean(item.clock for item in times), 2),
            slowest_read_ms=round(1000 * max(item.clock for item in times), 2),
            compute_ms=round(1000 * statistics.median(item.clock for item in computing), 1),
            batch=batch,
            reads=len(times),
            numbers=str(device.dtype),
        )


@click.command()
@click.option("--size", type=click.Choice(list(_SHAPES)), multiple=True)
@click.option("--steps", type=click.IntRange(4), default=8, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Scratch, on the disk in question.")
def main(size: tuple[str, ...], steps: int, folder: Path | None) -> None:
    """Print the shares of the sizes named, or of both."""
    for name in size or ("demo", "published"):
        measure(name, steps, folder)


if __name__ == "__main__":
    main()
