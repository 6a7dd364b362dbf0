"""Opening, training on and reading a training set, from a thousand pairs to a million.

    python -m benchmarks.data_scale [--pairs 1000,10000,100000,1000000] [--folder DIR]

Synthetic pairs, an image each, with captions of Quilt-1M's usual length and features of 4 tokens of
8 numbers; a process for each size. Opening is what `clover align` does before its first step:
`load_feature_set` (records read and checked, images looked for, their features found in the cache),
and then the sampler's first epoch. Training is stage 1 itself, through the loop, with the smallest
bridge that makes sense (one layer of 32 numbers; contrast and matching, since a caption's loss is
30,523 words' scores): 400 steps of 32 pairs, of which the first 100 are
not counted, the median of the rest. Reading is a whole epoch of shuffled batches of 32, captions
and tokens, with no step between them. Times a pair are the processor's. Memory is what the process
itself holds (RssAnon): mapped files are the system's to keep.

The images are hard links to few files, whose hashes the cache remembers as if they were of
different files: a million files of 4 KiB would fill a disk. Their contents are never read here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import click
import torch
from PIL import Image
from torch import Tensor

from benchmarks.figure import print_figure
from clover.align.objective import AlignObjective
from clover.core.config import AlignConfig, EncoderConfig, QFormerConfig, load_recipe
from clover.core.digests import DigestMemory
from clover.core.run import RunFolder
from clover.model import load_tokenizer
from clover.qformer.bridge import Bridge
from clover.qformer.tokenizer import Tokens
from clover.training.device import choose_device
from clover.training.loop import TrainingJob, train
from clover.training.sampler import Sampler
from clover.vision.cache import FeatureCache
from clover.vision.dataset import FeatureSet, load_feature_set
from clover.vision.encoder import TinyEncoder
from clover.vision.shard import write_shard

_ENCODER = EncoderConfig(kind="tiny", image_size=32, grid=2)
_LINKS = 60_000
"""Of one file: ext4 allows 65,000."""
_SHARD = 128
_BATCH = 32
_STEPS, _STEPS_NOT_COUNTED = 400, 100
_CAPTION = (
    "H&E-stained section of colon, case {}: crowded crypts with enlarged, hyperchromatic nuclei "
    "that stand close together, a lymphoid infiltrate in the lamina propria and few goblet cells."
)


def write(folder: Path, pairs: int) -> None:
    """Write records, image names, remembered hashes and features."""
    memory = DigestMemory(folder / "cache" / "digests.sqlite")
    cache = FeatureCache(folder / "cache", TinyEncoder(_ENCODER)).path
    generator = torch.Generator().manual_seed(0)
    keys: list[str] = []
    with (folder / "captions.jsonl").open("w", encoding="utf-8") as out:
        for index in range(pairs):
            name = f"images/{index // 1000:04d}/film_image_{index}.jpg"
            image = folder / name
            if index % 1000 == 0:
                image.parent.mkdir(parents=True)
            if index % _LINKS == 0:
                source = folder / f"{index}.png"
                Image.new("RGB", (32, 32)).save(source)
                found = source.stat()
            os.link(source, image)
            sha = hashlib.sha256(name.encode()).digest()
            # Made links change their file's time: every one is remembered with the last of these.
            memory._new[os.path.abspath(image)] = (found.st_size, 0, sha)
            keys.append(sha.hex())
            row = {"id": f"quilt-{index}", "image": name, "caption": _CAPTION.format(index)}
            out.write(json.dumps({**row, "source": "quilt1m", "split": "train"}) + "\n")
            if len(keys) == _SHARD or index + 1 == pairs:
                tokens = torch.randn(len(keys), 4, 8, generator=generator).half()
                write_shard(
                    cache / f"shard-{index:016x}.safetensors",
                    keys,
                    [{"tokens": tokens}],
                    storage="float16",
                    encoder="benchmark",
                )
                keys = []
    changed = {}
    for start in range(0, pairs, _LINKS):
        found = (folder / f"{start}.png").stat()
        changed[start // _LINKS] = max(found.st_mtime_ns, found.st_ctime_ns)
    for index, (path, (size, _, sha)) in enumerate(memory._new.items()):
        memory._new[path] = (size, changed[index // _LINKS], sha)
    memory.save()


def own_memory_mib() -> float:
    """Return what this process holds itself, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no RssAnon in /proc/self/status: this needs Linux")


class Watched(AlignObjective):
    """Notes the processor's time when each batch is asked for."""

    times: ClassVar[list[float]] = []

    def collate(self, indices: Sequence[int]) -> tuple[Tensor, Tokens]:
        """Return image tokens [B, P, E] and captions."""
        self.times.append(time.process_time())
        return super().collate(indices)


def train_us(data: FeatureSet, folder: Path) -> float:
    """Return a pair's share of a step of stage 1, in microseconds of the processor."""
    shape = QFormerConfig(
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        intermediate_size=64,
        num_queries=4,
        encoder_width=8,
        cross_attention_frequency=1,
        embedding_size=16,
    )
    config = AlignConfig(
        steps=_STEPS, batch_size=_BATCH, max_text_tokens=32, losses=("contrast", "match")
    )
    device = choose_device("cpu", "float32")
    bridge = Bridge(shape, has_alignment=True)
    tokenizer = load_tokenizer(load_recipe("phantom"))
    objective = Watched(bridge, data, tokenizer, config, device)
    train(objective, TrainingJob("align", config, RunFolder(folder / "run"), device, 0, "key"))
    ends = objective.times[_STEPS_NOT_COUNTED:]
    steps = [after - before for before, after in itertools.pairwise(ends)]
    return statistics.median(steps) / _BATCH * 1e6


def child(folder: Path) -> None:
    """Open, train, read an epoch, and print what it took."""
    torch.set_num_threads(1)
    encoder = TinyEncoder(_ENCODER)
    before = own_memory_mib()
    begun, used = time.perf_counter(), time.process_time()
    data = load_feature_set(
        folder / "captions.jsonl", needs="caption", encoder=encoder, cache=folder / "cache"
    )
    sampler = Sampler(len(data.records), _BATCH, seed=0)
    sampler.batch(0)
    opened, open_used = time.perf_counter() - begun, time.process_time() - used
    held = own_memory_mib() - before
    used, words = time.process_time(), 0
    for step in range(sampler.batches_per_epoch):
        batch = sampler.batch(step)
        words += sum(len((data.records[index].caption or "").split()) for index in batch)
        data.features(batch)
    read = (time.process_time() - used) / (sampler.batches_per_epoch * _BATCH)
    assert words > 20 * len(data.records), "captions are lost"
    row = {"open_s": opened, "open_processor_s": open_used, "held_mib": held}
    row |= {"read_us": read * 1e6, "after_mib": own_memory_mib() - before}
    row["train_us"] = train_us(data, folder)
    print(json.dumps({**row, "trained_mib": own_memory_mib()}))


@click.command()
@click.option("--pairs", default="1000,10000,100000,1000000", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Scratch; a temporary one.")
@click.option("--child", "inner", type=click.Path(path_type=Path), hidden=True)
def main(pairs: str, folder: Path | None, inner: Path | None) -> None:
    """Print one figure a size."""
    if inner is not None:
        child(inner)
        return
    first: dict[str, float] = {}
    for count in map(int, pairs.split(",")):
        scratch = Path(tempfile.mkdtemp(prefix="clover-scale-", dir=folder))
        try:
            write(scratch, count)
            command = [sys.executable, "-m", "benchmarks.data_scale", "--child", str(scratch)]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        finally:
            shutil.rmtree(scratch)
        first = first or found
        print_figure(
            "open and read", found["open_s"], "s to open", pairs=count,
            peer="the first size", read_ratio=round(found["read_us"] / first["read_us"], 3),
            train_ratio=round(found["train_us"] / first["train_us"], 3),
            **{name: round(value, 2) for name, value in found.items()},
        )  # fmt: skip


if __name__ == "__main__":
    main()
