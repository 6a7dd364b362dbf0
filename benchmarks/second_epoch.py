"""A stage-1 step of a second epoch: features from the cache against an encoder that runs again.

    python -m benchmarks.second_epoch [--steps 2] [--images 2] [--small]
    python -m benchmarks.second_epoch --into parts/ --only "encoder bfloat16"

The peer keeps nothing: for each batch of 8 it decodes the images, runs EVA-CLIP ViT-g/14 (39
blocks, 224 px, random weights; our network, which is no slower than transformers', by torch's own
operations) and makes the naive step (`benchmarks.train_step`: four separate passes). Ours reads the
batch from the feature cache, checks it, and makes our step. Both sides in float32, ours also in
bfloat16 where the processor multiplies that fast; then the encoder's bfloat16 is printed too, for a
peer that has it but for its step.

Time is processor time, of one process each: the core may be shared. Reading is of pages that the
system holds; what a disk adds, it does not count as processor time. With `--into` each part is kept
as it is done.
"""

from __future__ import annotations

import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from PIL import Image

from benchmarks.figure import print_figure
from benchmarks.naive import torch_operations
from benchmarks.train_step import BATCH, PLACES, SIZES, stage_1
from clover.core.config import EncoderConfig, QFormerConfig
from clover.core.files import read_json, write_json
from clover.training.device import choose_device, multiplies_bfloat16_fast
from clover.vision.cache import FeatureCache
from clover.vision.encoder import TinyEncoder, load_encoder
from clover.vision.places import digest_array
from clover.vision.storage import STORAGES, Storage, pack

PARTS = ("encoder", "peer", "ours", "read")
"""Each in float32; `encoder` and `ours` in bfloat16 too, `read` for each storage."""
_CACHED = 256
"""Images in the cache that is read: more than a batch, so that rows are not all of one shard."""
_SIDE = 512
"""Pixels of an image's side, as Quilt-1M's are or larger."""


def parts() -> list[str]:
    """Return the names of all parts that can be measured here."""
    formats = ("float32", *["bfloat16"] * multiplies_bfloat16_fast())
    return [
        *(f"encoder {numbers}" for numbers in formats),
        "peer float32",
        *(f"ours {numbers}" for numbers in formats),
        *(f"read {storage}" for storage in STORAGES),
    ]


def _processor(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def _median(function: Callable[[], object], runs: int) -> float:
    function()
    return statistics.median(_processor(function) for _ in range(runs))


def encode(numbers: str, size: str, images: int, runs: int) -> float:
    """Return the seconds that an image takes: decoded, resized and encoded."""
    model = "vit_g_14" if size == "published" else "vit_tiny_14"
    encoder = load_encoder(EncoderConfig(kind="eva_clip", model=model, numbers=numbers))  # type: ignore[arg-type]
    noise = torch.randint(0, 256, (_SIDE // 8, _SIDE // 8, 3), dtype=torch.uint8)
    picture = Image.fromarray(noise.numpy()).resize((_SIDE, _SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)

    def run() -> None:
        pixels = [encoder.prepare(Image.open(io.BytesIO(file.getvalue()))) for _ in range(images)]
        with torch_operations():
            encoder.encode(torch.stack(pixels))

    return _median(run, runs) / images


def read(storage: Storage, size: str, runs: int) -> float:
    """Return the seconds that a batch takes out of the cache, each image read before, or not."""
    width = QFormerConfig(**SIZES[size]).encoder_width  # type: ignore[arg-type]
    digests = [f"{row:064x}" for row in range(_CACHED)]
    with tempfile.TemporaryDirectory() as folder:
        made = FeatureCache(folder, TinyEncoder(EncoderConfig(kind="tiny")), storage=storage)
        for start in range(0, _CACHED, 128):
            tokens = torch.randn(128, PLACES, width)
            packed = [pack(image, storage) for image in tokens.split(1)]
            made.write(digests[start : start + 128], packed)
        cache = FeatureCache(folder, TinyEncoder(EncoderConfig(kind="tiny")), storage=storage)
        assert cache.are_whole(digest_array(map(bytes.fromhex, digests))).all()
        order = torch.randperm(_CACHED).tolist()
        batches = [order[start : start + BATCH] for start in range(0, _CACHED, BATCH)]

        def run() -> None:
            for batch in batches:
                cache.get([digests[row] for row in batch])

        return _median(run, runs) / len(batches)


def step(part: str, numbers: str, size: str, runs: int) -> float:
    """Return the seconds of a step, ours or the peer's, on features that are there."""
    device = choose_device("cpu", numbers)  # type: ignore[arg-type]
    ours, peer = stage_1(size, device)
    return _median(ours if part == "ours" else peer, runs)


def measure(name: str, size: str, steps: int, images: int) -> float:
    """Return the seconds of one part."""
    part, numbers = name.split()
    torch.manual_seed(0)
    if part == "encoder":
        return encode(numbers, size, images, steps)
    if part == "read":
        return read(numbers, size, steps)  # type: ignore[arg-type]
    return step(part, numbers, size, steps)


def print_rows(found: dict[str, float], size: str) -> None:
    """Print the ratio of each pair of sides whose parts are all there."""
    for numbers in ("float32", "bfloat16"):
        for encoder in ("float32", "bfloat16"):
            names = [f"encoder {encoder}", "peer float32", f"ours {numbers}", "read float16"]
            if not all(name in found for name in names):
                continue
            encoding, peer, ours, reading = (found[name] for name in names)
            print_figure(
                f"second epoch, stage-1 step of {size} size, ours {numbers}",
                (BATCH * encoding + peer) / (ours + reading),
                "x",
                peer=f"encodes in {encoder} again, naive step in float32",
                batch=BATCH,
                encode_an_image_s=round(encoding, 3),
                naive_step_s=round(peer, 3),
                our_step_s=round(ours, 3),
                **{name.replace(" ", "_") + "_s": round(found[name], 5) for name in found
                   if name.startswith("read")},
            )  # fmt: skip


@click.command()
@click.option("--steps", default=2, show_default=True, help="Measured runs of each part.")
@click.option("--images", default=2, show_default=True, help="Images that are encoded together.")
@click.option("--small", is_flag=True, help="A size that only shows that it runs.")
@click.option("--into", type=click.Path(path_type=Path), help="Keep each part here as it is done.")
@click.option("--only", help="With --into: measure the part of this name alone.")
@click.option("--child", hidden=True)
def main(
    steps: int, images: int, small: bool, into: Path | None, only: str | None, child: str | None
) -> None:
    """Print how many times the peer's step takes ours; parts kept are not redone."""
    size = "small" if small else "published"
    if child:
        print(json.dumps(measure(child, size, steps, images)))
        return
    folder = into or Path(tempfile.mkdtemp(prefix="clover-epoch-"))
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, float] = {}
    for name in parts():
        kept = folder / f"{size}-{name.replace(' ', '-')}-{steps}.json"
        if not kept.exists() and only in (None, name):
            command = [sys.executable, "-m", "benchmarks.second_epoch", "--child", name]
            command += ["--steps", str(steps), "--images", str(images), *["--small"] * small]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            write_json(kept, json.loads(done.stdout.splitlines()[-1]))
        if kept.exists():
            found[name] = read_json(kept)
    print_rows(found, size)


if __name__ == "__main__":
    main()
