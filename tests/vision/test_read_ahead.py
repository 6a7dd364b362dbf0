"""Reading ahead: what is announced is brought into memory, and shows the view it was told."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clover.core.config import EncoderConfig
from clover.training.loop import train
from clover.vision.cache import FeatureCache
from clover.vision.dataset import FeatureSet, load_feature_set
from clover.vision.encoder import TinyEncoder
from clover.vision.shard import write_shard
from clover.vision.storage import pack
from line import Line, job_of

PAGE = mmap.PAGESIZE


def pages_in_memory(path: Path) -> list[bool]:
    """Return which pages of a file the system holds."""
    size = path.stat().st_size
    pages = -(-size // PAGE)
    found = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY) as area:
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), found) == 0
    return [bool(page & 1) for page in found]


def forget(path: Path) -> None:
    """Ask the system to let go of a file's pages."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems are not asked")
def test_announced_rows_come_into_memory_and_others_do_not(tmp_path: Path) -> None:
    keys = [f"{index:064x}" for index in range(16)]
    tokens = torch.randn(16, 64, 4096)  # half a megabyte a row
    parts = [pack(row[None], "int8") for row in tokens]  # two tensors: both must come
    path = tmp_path / "shard-0.safetensors"
    shard = write_shard(path, keys, parts, storage="int8", encoder="test")
    forget(path)
    if any(pages_in_memory(path)):
        pytest.skip("this file system keeps what it is asked to forget (held in memory?)")
    shard.announce([9, 12])
    wanted = {
        page
        for start, size in shard._extents or []
        for row in (9, 12)
        for page in range((start + row * size) // PAGE, (start + (row + 1) * size - 1) // PAGE + 1)
    }
    for _ in range(200):  # the system reads when it likes: waited for, not timed
        held = {place for place, is_held in enumerate(pages_in_memory(path)) if is_held}
        if wanted <= held:
            break
        time.sleep(0.05)
    assert wanted <= held
    assert len(held) < 0.6 * len(pages_in_memory(path)), "the whole file was read"
    torch.testing.assert_close(shard.read(9), tokens[9], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0[]", None])
def test_announcing_a_damaged_or_missing_shard_is_quiet(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "shard-0.safetensors"
    shard = write_shard(
        path, ["0" * 64], [pack(torch.randn(1, 4, 8), "float16")], storage="float16", encoder="test"
    )
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    shard.announce([0])


def feature_set(folder: Path, *, views: int) -> FeatureSet:
    """Return eight noise images with their features."""
    random = np.random.default_rng(0)
    rows = []
    for index in range(8):
        pixels = random.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        rows.append({"id": str(index), "image": f"{index}.png", "caption": "c"})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_feature_set(
        folder / "captions.jsonl",
        needs="caption",
        encoder=TinyEncoder(EncoderConfig(kind="tiny", image_size=32, grid=4)),
        cache=folder / "c",
        views=views,
        view_kind="turn",
    )


def test_what_was_announced_has_its_view_and_takes_no_number_of_the_training(
    tmp_path: Path,
) -> None:
    data = feature_set(tmp_path, views=4)
    cache: FeatureCache = data.cache

    def view(index: int, number: int) -> torch.Tensor:
        return cache.get([data.digests[index]], [number])[0]

    data.announce([1, 2], [7, 4])  # views 3 and 0
    data.announce([5], [2])
    data.announce([1, 2], [1, 1])
    state = torch.get_rng_state()
    first = data.features([1, 2])
    assert torch.equal(first, torch.stack([view(1, 3), view(2, 0)]))
    # [5] is never asked for: what comes after it still is what it was told.
    assert torch.equal(data.features([1, 2]), torch.stack([view(1, 1), view(2, 1)]))
    assert torch.equal(torch.get_rng_state(), state)
    data.features([5])
    assert not torch.equal(torch.get_rng_state(), state), "not announced any more: drawn"


def test_the_loop_announces_two_steps_ahead_and_no_step_too_many(tmp_path: Path) -> None:
    class Watched(Line):
        def __init__(self) -> None:
            super().__init__([1.0] * 64)
            self.ahead: list[int] = []
            self.asked: list[list[int]] = []

        def collate(self, indices: object) -> torch.Tensor:
            self.asked.append(list(indices))  # type: ignore[call-overload]
            self.ahead.append(len(self.announced) - len(self.asked))
            return super().collate(indices)  # type: ignore[arg-type]

    watched = Watched()
    train(watched, job_of(tmp_path, steps=6, batch_size=8, accumulate=2))
    assert [indices for indices, _ in watched.announced] == watched.asked
    assert watched.ahead == [4, 4, 4, 4, 4, 4, 4, 4, 3, 2, 1, 0]


def test_what_is_drawn_for_a_step_is_the_same_however_often_training_stopped(
    tmp_path: Path,
) -> None:
    whole = Line([1.0] * 24)
    train(whole, job_of(tmp_path / "whole", steps=7, batch_size=4))
    parts = [Line([1.0] * 24) for _ in range(3)]
    for line, stop in zip(parts, (2, 5, None), strict=True):
        job = job_of(tmp_path / "parts", steps=7, batch_size=4)
        train(line, replace(job, max_steps=stop))
    assert [batch for line in parts for batch in line.announced] == whole.announced
    draws = [tuple(numbers) for _, numbers in whole.announced]
    assert len(set(draws)) == len(draws), "another step, other numbers"
    other = Line([1.0] * 24)
    job = job_of(tmp_path / "other", steps=7, batch_size=4)
    train(other, replace(job, seed=1))
    assert [numbers for _, numbers in other.announced] != [list(row) for row in draws]
