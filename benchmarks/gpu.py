"""The tables of docs/benchmarks.md that need an accelerator: steps, encoder, cache, a profile.

    python -m benchmarks.gpu --part peak --part stage-1 --part stage-2 [--out FOLDER]

Seconds are between CUDA events around each step, medians; memory is what torch had allocated at its
peak. Work is the matrix products and attention that torch's own counter counts in our step; its
share of the peak is of the largest product's rate, measured first (8192 x 8192 x 8192 in bfloat16).
Weights are random and of the published shapes: speed does not hang on them. A part that fails says
so and the next one runs. On a machine without an accelerator `--small` shows that it runs.
"""

from __future__ import annotations

import gc
import io
import itertools
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import click
import torch
from PIL import Image
from tests.tiny import write_tokenizer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.figure import print_figure
from benchmarks.train_step import SIZES, stage_1, stage_2
from benchmarks.wait import prepare
from clover.align.objective import AlignObjective
from clover.core.config import AlignConfig, EncoderConfig, QFormerConfig
from clover.core.files import sha256_file
from clover.core.run import RunFolder
from clover.qformer.bridge import Bridge
from clover.qformer.tokenizer import TextTokenizer
from clover.training.device import Device
from clover.training.loop import TrainingJob, train
from clover.vision.cache import FeatureCache
from clover.vision.encoder import load_encoder
from clover.vision.storage import Storage

Step = Callable[[], object]
IS_CUDA = torch.cuda.is_available()
WHERE = torch.device("cuda" if IS_CUDA else "cpu")
_SIDE = 512
"""Pixels of an image's side, as Quilt-1M's are or larger."""
_BIG = 8192


def device(numbers: str) -> Device:
    """Return the accelerator with this number format."""
    return Device(WHERE, getattr(torch, numbers))


def timed(step: Step, *, runs: int, before: int = 3) -> float:
    """Return the median seconds of a call: what passes on the device from one to the next."""
    for _ in range(before):
        step()
    if not IS_CUDA:
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(
        first.elapsed_time(second) / 1000 for first, second in itertools.pairwise(marks)
    )


@cache
def peak(small: bool) -> float:
    """Return TFLOP/s of a large product in bfloat16."""
    return rate(_size(small), torch.bfloat16)


def _size(small: bool) -> int:
    return 256 if small else _BIG


def rate(size: int, dtype: torch.dtype) -> float:
    """Return TFLOP/s of a product of two square matrices of random numbers."""
    left, right = (torch.randn(size, size, device=WHERE).to(dtype) for _ in range(2))
    return 2 * size**3 / timed(lambda: left @ right, runs=10) / 1e12


def show_peak(small: bool, _: Path) -> None:
    """Print the ceilings."""
    print_figure("bfloat16 product", peak(small), "TFLOP/s", size=_size(small))
    print_figure("float32 product", rate(_size(small), torch.float32), "TFLOP/s")
    count = (1 << 20) if small else (1 << 30)
    source = torch.randn(count, device=WHERE)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), runs=10)
    print_figure("copy, read and written", 8 * count / seconds / 1e12, "TB/s")


def work_of(step: Step) -> float | None:
    """Return the TFLOP of a step; None for an attention that torch's counter does not know."""
    with FlopCounterMode(display=False) as counter:
        try:
            step()
        except AssertionError:  # it knows no heads that share keys
            return None
    return counter.get_total_flops() / 1e12


def _peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if IS_CUDA else 0.0


def _forget() -> None:
    gc.collect()
    if IS_CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def show_steps(
    name: str, make: Callable[[Device], tuple[Step, Step]], small: bool, *, batch: int,
    runs: int, rows: tuple[tuple[str, str], ...],
) -> None:  # fmt: skip
    """Print seconds, memory and share of the peak of sides of a step, and the ratio to the first.

    Args:
        name: Of the step.
        make: From a device to our step and the peer's.
        small: A size that only shows that it runs.
        batch: Pairs or instructions.
        runs: Measured steps.
        rows: (side, number format) of each row.
    """
    first = None
    for side, numbers in rows:
        _forget()
        ours, peer = make(device(numbers))
        step = ours if side == "ours" else _under_autocast(peer, device(numbers))
        del ours, peer
        # The first time plainly: a recorded step shows a counter nothing.
        work = work_of(step) if side == "ours" else None
        start = time.perf_counter()
        step()
        begun = time.perf_counter() - start
        seconds = timed(step, runs=runs)
        more: dict[str, object] = {}
        if work is not None:
            more["tflop"] = round(work, 3)
            more["tflop_a_second"] = round(work / seconds, 1)
            more["of_peak"] = round(work / seconds / peak(small), 3)
        first = seconds if first is None else first
        print_figure(
            f"{name}, {side}, {numbers}", seconds, "s", batch=batch, peak_gib=round(_peak_gib(), 2),
            times_the_first=round(first / seconds, 2), first_step_s=round(begun, 1), **more,
        )  # fmt: skip
        del step


def _under_autocast(step: Step, where: Device) -> Step:
    def run() -> None:
        with where.autocast():
            step()

    return run


_BOTH = (("peer", "float32"), ("ours", "float32"), ("peer", "bfloat16"), ("ours", "bfloat16"))
_HALF = (("peer", "bfloat16"), ("ours", "bfloat16"))


def show_stage_1(small: bool, _: Path) -> None:
    """Print stage 1 at the table's batch, the recipe's, and one that fills the device."""
    size = "small" if small else "published"
    for batch, rows in ((8, _BOTH), (36, _HALF), (256, _HALF)):
        batch = min(batch, 12) if small else batch
        show_steps(
            "stage 1", lambda d, b=batch: stage_1(size, d, b), small, batch=batch, rows=rows,  # type: ignore[misc]
            runs=2 if small else 12,
        )  # fmt: skip


def show_stage_2(small: bool, _: Path) -> None:
    """Print stage 2 with SmolLM2's shape at the table's batch, and with Vicuna-7B's."""
    size = "small" if small else "published"
    sizes = ((8, "135m", _BOTH), (8, "7b", _HALF), (64, "7b", _HALF[1:]))
    for batch, decoder, rows in sizes:
        show_steps(
            f"stage 2, {decoder}",
            lambda d, b=batch, n=decoder: stage_2(size, d, b, "small" if small else n),  # type: ignore[misc]
            small, batch=batch, rows=rows, runs=2 if small else 12,
        )  # fmt: skip


def _encoder(small: bool) -> EncoderConfig:
    model = "vit_tiny_14" if small else "vit_g_14"
    numbers = "bfloat16" if IS_CUDA else "float32"
    return EncoderConfig(kind="eva_clip", model=model, numbers=numbers, batch_size=64)  # type: ignore[arg-type]


@cache
def _loaded(small: bool) -> object:
    start = time.perf_counter()
    with WHERE:  # a billion random numbers take a processor a quarter of a minute
        encoder = load_encoder(_encoder(small))
    print_figure("encoder built", time.perf_counter() - start, "s")
    return encoder


def show_encoder(small: bool, _: Path) -> None:
    """Print images a second of the network alone."""
    encoder = _loaded(small)
    network = encoder.network  # type: ignore[attr-defined]
    dtype = next(network.parameters()).dtype
    for batch in (32, 64, 128):
        _forget()
        pixels = torch.randn(min(batch, 4) if small else batch, 3, 224, 224, device=WHERE).to(dtype)
        with torch.no_grad():
            work = work_of(lambda p=pixels: network(p)) or 0.0  # type: ignore[misc]
            seconds = timed(lambda p=pixels: network(p), runs=2 if small else 10)  # type: ignore[misc]
        print_figure(
            "EVA-g", len(pixels) / seconds, "images/s", batch=len(pixels),
            tflop_an_image=round(work / len(pixels), 4),
            of_peak=round(work / seconds / peak(small), 3), peak_gib=round(_peak_gib(), 2),
        )  # fmt: skip


def _jpegs(folder: Path, count: int) -> Iterator[Path]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(
        0, 256, (_SIDE // 8, _SIDE // 8, 3), dtype=torch.uint8, generator=generator
    )
    picture = Image.fromarray(noise.numpy()).resize((_SIDE, _SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    for number in range(count):
        path = folder / f"{number}.jpg"
        # Bytes behind a JPEG's end are no part of the picture: as many different files.
        path.write_bytes(file.getvalue() + number.to_bytes(4, "big"))
        yield path


def show_features(small: bool, _: Path) -> None:
    """Print images a second from JPEG files to the shards of the cache."""
    encoder = _loaded(small)
    count = 8 if small else 3072
    with tempfile.TemporaryDirectory(prefix="clover-gpu-") as name:
        folder = Path(name)
        paths = {sha256_file(path): path for path in _jpegs(folder, count)}
        for storage in ("float16", "int8"):
            cache_ = FeatureCache(folder / "cache", encoder, storage=storage)  # type: ignore[arg-type]
            start = time.perf_counter()
            rejected = cache_.fill(paths)
            seconds = time.perf_counter() - start
            assert not rejected, rejected[0]
            print_figure(
                "features from JPEG", count / seconds, "images/s", storage=storage, images=count
            )


def show_loop(small: bool, _: Path) -> None:
    """Print seconds a step of `clover align`'s own loop, from the cache and with features at hand.

    The difference is what a step waits for its features.
    """
    for storage, batch in (("float16", 36), ("int8", 36), ("float16", 256)):
        _forget()
        with tempfile.TemporaryDirectory(prefix="clover-gpu-") as name:
            _show_loop(Path(name), storage, min(batch, 8) if small else batch, small)  # type: ignore[arg-type]


def _show_loop(folder: Path, storage: Storage, batch: int, small: bool) -> None:
    places, width = (5, 64) if small else (257, 1408)
    images, steps = (32, 20) if small else (1152, 60)
    size = SIZES["small" if small else "published"]
    data = prepare(folder, images, places, width, storage=storage)
    where = device("bfloat16" if IS_CUDA else "float32")
    # Of single letters: captions fill all 32 places.
    tokenizer = TextTokenizer(write_tokenizer(folder / "tokenizer.json", [*"0123456789&:-,."]))
    config = AlignConfig(steps=steps, batch_size=batch, learning_rate=1e-5, warmup_steps=1)
    seconds: dict[str, float] = {}
    for how in ("from the cache", "features at hand"):
        torch.manual_seed(0)
        bridge = Bridge(QFormerConfig(**size), has_alignment=True)  # type: ignore[arg-type]
        objective = AlignObjective(bridge, data, tokenizer, config, where)
        if how != "from the cache":
            held = objective.collate(range(batch))
            objective.collate = lambda _, held=held: held  # type: ignore[method-assign, misc]
            objective.announce = lambda *_: None  # type: ignore[method-assign]
        run = RunFolder(folder / how.replace(" ", "-"))
        train(objective, TrainingJob("align", config, run, where, 0, "benchmark"))
        rows = run.metrics("align")
        times = [row["seconds_per_step"] for row in rows if "seconds_per_step" in row]
        # The first window has the plain step and the recording, of each width of text.
        seconds[how] = statistics.median(times[len(times) // 2 :])
        print_figure(
            f"stage 1, {how}", seconds[how], "s", batch=batch, storage=storage, all_s=times
        )
    waits = 1 - seconds["features at hand"] / seconds["from the cache"]
    print_figure("share that waits for features", 100 * waits, "%", batch=batch, storage=storage)


def show_compiled(small: bool, _: Path) -> None:
    """Print stage 1 with compiled layers, and how long its first step takes."""
    for batch in (256, 36):
        _forget()
        batch = min(batch, 4) if small else batch
        size = "small" if small else "published"
        step, _peer = stage_1(size, device("bfloat16"), batch)
        work = work_of(step) or 0.0
        del step, _peer
        _forget()
        step, _peer = stage_1(size, device("bfloat16"), batch, compiled=True)
        start = time.perf_counter()
        step()
        if IS_CUDA:
            torch.cuda.synchronize()
        begun = time.perf_counter() - start
        seconds = timed(step, runs=2 if small else 12)
        print_figure(
            "stage 1, ours, compiled, bfloat16", seconds, "s", batch=batch,
            first_step_s=round(begun, 1), peak_gib=round(_peak_gib(), 2), tflop=round(work, 3),
            of_peak=round(work / seconds / peak(small), 3),
        )  # fmt: skip
        del step, _peer


def show_profile(small: bool, out: Path) -> None:
    """Write where a step's time goes: kernels by their sum, and a trace of one step."""
    from torch.profiler import ProfilerActivity, profile

    size = "small" if small else "published"
    where = device("bfloat16")
    made = {
        "stage-1": lambda: stage_1(size, where, 36)[0],
        "stage-2": lambda: stage_2(size, where, 8, "small" if small else "7b")[0],
    }
    for name, make in made.items():
        _forget()
        step = make()
        for _ in range(3):
            step()
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * IS_CUDA]
        with profile(activities=activities) as found:
            for _ in range(2):
                step()
            if IS_CUDA:
                torch.cuda.synchronize()
        key = "self_cuda_time_total" if IS_CUDA else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=key, row_limit=45, max_name_column_width=70)
        (out / f"profile-{name}.txt").write_text(table)
        if name == "stage-1":  # one is enough to look at
            found.export_chrome_trace(str(out / f"trace-{name}.json.gz"))
        del step


PARTS = {
    "peak": show_peak,
    "stage-1": show_stage_1,
    "stage-2": show_stage_2,
    "encoder": show_encoder,
    "features": show_features,
    "loop": show_loop,
    "compiled": show_compiled,
    "profile": show_profile,
}


@click.command()
@click.option("--part", "parts", type=click.Choice(list(PARTS)), multiple=True)
@click.option("--small", is_flag=True, help="A size that only shows that it runs.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("gpu-figures"))
def main(parts: tuple[str, ...], small: bool, out: Path) -> None:
    """Print the figures of the parts named, or of all."""
    out.mkdir(parents=True, exist_ok=True)
    for name in parts or PARTS:
        start = time.perf_counter()
        try:
            PARTS[name](small, out)
        except Exception:
            print(f"FAILED {name}\n{traceback.format_exc()}", flush=True)
        print(f"# {name}: {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
