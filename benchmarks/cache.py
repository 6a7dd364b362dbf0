"""The feature cache against one file an image: writing, reading, size.

    python -m benchmarks.cache [--images 256] [--together 2] [--folder DIR]

The peer writes each image's tokens with `torch.save` and reads them with `torch.load`, in one
process. Both sides get the same tokens: of Lite0's size in the demo, and of EVA-g's. Files are read
from the system's memory, after a first reading that is not counted. Time is processor time, the
system's in it: the core may be shared, and files are written into the system's memory by both.
Freed memory is kept (`keep_freed_memory`), for both, as `clover features` does.

With `--together N` writing is measured by the clock, ours by N processes as `clover features
--workers N` starts them, the peer's still by one: on a quiet machine, in a folder of `--folder`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.figure import alternating, print_figure
from clover.core.memory import keep_freed_memory
from clover.vision.shard import Shard, write_shard
from clover.vision.storage import STORAGES, Storage, pack

_SHAPES = {"lite0": (196, 272), "eva-g": (257, 1408)}
_SHARD = 128


def _write_shards(folder: Path, tokens: Tensor, storage: Storage) -> list[Shard]:
    return [
        write_shard(
            folder / f"shard-{start:06d}.safetensors",
            [f"{row:064x}" for row in range(start, min(start + _SHARD, len(tokens)))],
            [pack(image, storage) for image in tokens[start : start + _SHARD].split(1)],
            storage=storage,
            encoder="benchmark",
        )
        for start in range(0, len(tokens), _SHARD)
    ]


def _write_files(folder: Path, tokens: Tensor) -> None:
    for row, item in enumerate(tokens):
        torch.save(item.half().clone(), folder / f"{row}.pt")


def measure(name: str, folder: Path, *, images: int, runs: int) -> None:
    """Print the figures of one shape of tokens."""
    places, width = _SHAPES[name]
    tokens = torch.randn(images, places, width, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(images, generator=torch.Generator().manual_seed(1)).tolist()
    peer = folder / "peer"
    peer.mkdir()
    kept: dict[Storage, list[Shard]] = {}

    def write(storage: Storage) -> None:
        (folder / storage).mkdir(exist_ok=True)
        kept[storage] = _write_shards(folder / storage, tokens, storage)

    def read(storage: Storage) -> None:
        for row in order:
            kept[storage][row // _SHARD].read(row % _SHARD)

    def read_peer() -> None:
        for row in order:
            torch.load(peer / f"{row}.pt", weights_only=True).float()

    times = alternating(
        [lambda: _write_files(peer, tokens), *(lambda s=s: write(s) for s in STORAGES)],
        runs=runs,
        clock=time.process_time,
    )
    peer_size = sum(path.stat().st_size for path in peer.iterdir())
    reads = alternating(
        [read_peer, *(lambda s=s: read(s) for s in STORAGES)], runs=runs, clock=time.process_time
    )
    for place, storage in enumerate(STORAGES, start=1):
        size = sum(shard.path.stat().st_size for shard in kept[storage])
        shared = {"tokens": name, "storage": storage, "images": images}
        print_figure(
            "cache_write", images / times[place], "images/s",
            ratio=round(times[0] / times[place], 2), peer="torch.save an image", **shared,
        )  # fmt: skip
        print_figure(
            "cache_read", images / reads[place], "images/s",
            ratio=round(reads[0] / reads[place], 2), peer="torch.load an image", **shared,
        )  # fmt: skip
        print_figure(
            "cache_size", size / images / 1024, "KiB/image",
            ratio=round(size / peer_size, 3), peer="torch.save an image", **shared,
        )  # fmt: skip


def _write_when_told(
    folder: Path, name: str, images: int, storage: str, runs: int, meet: Barrier
) -> None:
    """Write so many images' tokens in each of some runs, begun and ended with the others."""
    torch.set_num_threads(1)
    keep_freed_memory()
    places, width = _SHAPES[name]
    tokens = torch.randn(images, places, width, generator=torch.Generator().manual_seed(0))
    for run in range(runs + 1):
        own = folder / f"{storage}-{os.getpid()}-{run}"
        own.mkdir()
        meet.wait()
        if storage == "torch.save":
            _write_files(own, tokens)
        else:
            _write_shards(own, tokens, storage)  # type: ignore[arg-type]
        meet.wait()
        shutil.rmtree(own)
        meet.wait()


def _seconds_together(
    folder: Path, name: str, images: int, storage: str, runs: int, processes: int
) -> list[float]:
    """Return the seconds of each run, the first left out, of processes that share the images."""
    context = get_context("spawn")
    meet = context.Barrier(processes + 1)
    share = (folder, name, images // processes, storage, runs, meet)
    writers = [context.Process(target=_write_when_told, args=share) for _ in range(processes)]
    for writer in writers:
        writer.start()
    times = []
    for _ in range(runs + 1):
        meet.wait()
        start = time.perf_counter()
        meet.wait()
        times.append(time.perf_counter() - start)
        meet.wait()
    for writer in writers:
        writer.join()
    return times[1:]


def measure_together(name: str, folder: Path, *, images: int, runs: int, processes: int) -> None:
    """Print images a second by the clock: ours by some processes, the peer's by one, in turn."""
    sides = {"torch.save": 1, **dict.fromkeys(STORAGES, processes)}
    found: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(2):
        for side, count in sides.items():
            found[side] += _seconds_together(folder, name, images, side, runs, count)
    slow = statistics.median(found["torch.save"])
    for storage in STORAGES:
        seconds = statistics.median(found[storage])
        print_figure(
            "cache_write, by the clock", images / seconds, "images/s",
            ratio=round(slow / seconds, 2), peer="torch.save an image, one process", tokens=name,
            storage=storage, images=images, processes=processes, spread=[
                round(slow / max(found[storage]), 2), round(slow / min(found[storage]), 2)],
        )  # fmt: skip


def main() -> None:
    """Measure both shapes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--together", type=int, default=0, help="Processes that write together.")
    parser.add_argument("--folder", type=Path, help="Scratch, on the disk in question.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    for name in _SHAPES:
        folder = Path(tempfile.mkdtemp(prefix="clover-cache-", dir=options.folder))
        sizes = {"images": options.images, "runs": options.runs}
        try:
            if options.together:
                measure_together(name, folder, **sizes, processes=options.together)
            else:
                measure(name, folder, **sizes)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
