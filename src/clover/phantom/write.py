"""Write a phantom set: pictures, captions and questions, whole or to be continued."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context, parent_process, resource_tracker
from pathlib import Path
from typing import Any

from clover.core.errors import CloverError
from clover.core.files import atomic_path, read_json, write_json
from clover.core.record import Record, write_records
from clover.core.run import num_processors
from clover.core.terminal import progress
from clover.phantom.caption import write_caption
from clover.phantom.case import MICRONS_PER_PIXEL, Case, Region, sample_case
from clover.phantom.picture import draw
from clover.phantom.question import Question, balance

_VERSION = 1
"""Raised when the same seed gives other pictures or words."""
_SOURCE = "phantom"
_LICENCE = "CC0-1.0"
_LEAST_A_WORKER = 64
"""Images below which another process does not pay: it takes a second to start."""


def make_phantom(
    out: Path, *, images: int, seed: int, split: str = "train", both_ways: bool = False
) -> None:
    """Write OUT/images/*.png, OUT/captions.jsonl and OUT/vqa.jsonl.

    Called again with the same arguments it finishes what is missing, and does nothing to a
    finished set.

    Args:
        out: The folder, made if absent.
        images: How many images, at least 1.
        seed: Another seed, another set; 0 or more.
        split: Name of the split. Two splits never share an image, whatever their seeds.
        both_ways: Ask "Is this kidney?" twice of each image, once with the right name.

    Raises:
        CloverError: a number out of range, or a folder that holds another set.
    """
    _check(images, seed, split)
    settings = {
        "version": _VERSION,
        "images": images,
        "seed": seed,
        "split": split,
        "both_ways": both_ways,
    }
    if _claim(out, settings):
        return
    cases = [sample_case(seed, split, index) for index in range(images)]
    captions: list[Record] = []
    with progress("phantom", images) as advance, _painted(cases, out) as painted:
        for case, regions in zip(cases, painted, strict=True):
            captions.append(_caption_record(case, regions))
            advance()
    asked = balance(cases, seed=seed, split=split, both_ways=both_ways)
    questions = [_question_record(case, item) for case in cases for item in asked[case.index]]
    write_records(out / "vqa.jsonl", questions)
    write_records(out / "captions.jsonl", captions)
    write_json(out / "phantom.json", settings | {"finished": True})


def _check(images: int, seed: int, split: str) -> None:
    if images < 1:
        raise CloverError(f"{images} images cannot be made; ask for 1 or more")
    if seed < 0:
        raise CloverError(f"seed {seed} is below 0; use {-seed}")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", split):
        raise CloverError(f"'{split}' is no split name; use letters, digits, - and _, like 'train'")


def _claim(out: Path, settings: dict[str, Any]) -> bool:
    """Mark a folder as this set's; return whether the set is already finished.

    Raises:
        CloverError: the folder holds another set, or somebody else's files.
    """
    marker = out / "phantom.json"
    if marker.exists():
        found = read_json(marker)
        # Sets made before they could be asked both ways were not.
        held = None
        if isinstance(found, dict):
            held = {key: ({"both_ways": False} | found).get(key) for key in settings}
        if held != settings:
            raise CloverError(
                f"{out} holds another phantom set ({_described(held)}), "
                f"not {_described(settings)}; choose another folder or delete that one"
            )
        names = ["captions.jsonl", "vqa.jsonl"]
        names += [f"images/{index:05d}.png" for index in range(settings["images"])]
        return bool(found.get("finished")) and all((out / name).exists() for name in names)
    if any((out / name).exists() for name in ("images", "captions.jsonl", "vqa.jsonl")):
        raise CloverError(
            f"{out} holds files that the phantom did not write; choose an empty folder"
        )
    write_json(marker, settings | {"finished": False})
    return False


def _described(settings: dict[str, Any] | None) -> str:
    return ", ".join(f"{key} {value}" for key, value in (settings or {}).items()) or "unreadable"


@contextlib.contextmanager
def _painted(cases: Sequence[Case], out: Path) -> Iterator[Iterator[tuple[Region, ...]]]:
    """Paint in as many processes as there are processors; yield the places of findings in order."""
    workers = min(num_processors(), len(cases) // _LEAST_A_WORKER)
    if workers < 2:
        yield (_paint(case, out) for case in cases)
        return
    # Not forked: torch may run threads in this process, and a fork of those can hang.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_follow_parent)
    try:
        with _without_interrupt():
            painted = pool.map(partial(_paint, out=out), cases, chunksize=8)
        yield painted
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _without_interrupt() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends; processes started in it never hear of one.

    A terminal sends it to all of them, and one that is still starting would print where it was.
    The parent hears it, and cancels what has not begun.
    """
    resource_tracker.ensure_running()  # otherwise started in the block, and it lets Ctrl-C in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow_parent() -> None:
    """End this process when its parent is gone, killed without a chance to say so."""

    def watch() -> None:
        parent = parent_process()
        assert parent is not None, "a worker is started by another process"
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _paint(case: Case, out: Path) -> tuple[Region, ...]:
    """Write a case's picture; return the places of its findings."""
    from PIL import Image

    path = out / "images" / f"{case.name}.png"
    picture = draw(case)
    if not path.exists():
        with atomic_path(path) as partial:
            # Level 1: a third of the time for a tenth more bytes.
            Image.fromarray(picture.image).save(partial, format="PNG", compress_level=1)
    return picture.regions


def _common(case: Case) -> dict[str, Any]:
    return {
        "image": f"images/{case.name}.png",
        "source": _SOURCE,
        "licence": _LICENCE,
        "split": case.split,
        "group": case.name,
    }


def _caption_record(case: Case, regions: tuple[Region, ...]) -> Record:
    fields = _common(case) | {
        "id": case.name,
        "caption": write_caption(case),
        "mpp": MICRONS_PER_PIXEL,
        "truth": case.truth(regions),
    }
    return Record.model_validate(fields)


def _question_record(case: Case, item: Question) -> Record:
    fields = _common(case) | {
        "id": f"{case.name}#{item.number}",
        "question": item.question,
        "answer": item.answer,
        "answer_type": item.answer_type,
        "form": item.form,
        "origin": "truth",
    }
    return Record.model_validate(fields)
