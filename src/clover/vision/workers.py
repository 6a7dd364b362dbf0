"""Several processes that fill one cache, on this machine or under Ray; each encodes what no other
has claimed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from clover.core.cluster import import_ray, under_ray
from clover.core.config import EncoderConfig
from clover.core.errors import CloverError
from clover.core.terminal import progress
from clover.vision.cache import FeatureCache
from clover.vision.dataset import FeatureSet, load_feature_set
from clover.vision.encoder import ImageEncoder, load_encoder

_LOOK_S = 2.0
"""Between two looks at what the workers under Ray have written."""


@dataclass(frozen=True)
class FillJob:
    """What to encode, and where to.

    Attributes:
        data: Records.
        config: Encoder, number format, views.
        folder: Of the caches.
        images: Where image paths start; the records' own folder when None.
    """

    data: Path
    config: EncoderConfig
    folder: Path
    images: Path | None = None

    def run(self, encoder: ImageEncoder | None = None) -> FeatureSet:
        """Encode what is missing, in this process.

        Args:
            encoder: That of `config`, where it is loaded already.

        Raises:
            CloverError: no usable image, or a disk that is full.
        """
        return load_feature_set(
            self.data,
            needs="any",
            encoder=encoder or load_encoder(self.config),
            cache=self.folder,
            images=self.images,
            storage=self.config.storage,
            views=self.config.views,
            view_kind=self.config.view_kind,
        )


def fill(job: FillJob, *, workers: int = 1) -> FeatureSet:
    """Encode what is missing in so many processes, this one among them.

    A process that dies costs the shard it worked on, which another one then makes.

    Raises:
        CloverError: see `FillJob.run`.
    """
    if workers == 1:
        return job.run()
    threads = torch.get_num_threads()
    share = max(1, threads // workers)
    context = multiprocessing.get_context("spawn")  # a fork would share torch's thread pool
    others = [
        context.Process(target=_work, args=(job, share), daemon=True) for _ in range(workers - 1)
    ]
    for other in others:
        other.start()
    torch.set_num_threads(share)
    try:
        return job.run()
    finally:
        torch.set_num_threads(threads)
        for other in others:
            other.terminate()  # nothing is left to do, or nothing can be done
            other.join()


def fill_under_ray(job: FillJob, *, workers: int = 1) -> FeatureSet:
    """The same with all workers under Ray, while this process waits for them.

    In a local Ray they divide this machine's threads among them, on a cluster each has one CPU; the
    GPUs are divided on either. All machines need the files by the same names.

    Raises:
        CloverError: see `FillJob.run`; or Ray is not there, or lost a worker.
    """
    import_ray()  # its absence shows before an encoder is loaded
    is_local = not os.environ.get("RAY_ADDRESS")
    threads = max(1, torch.get_num_threads() // workers) if is_local else 1
    here = Path.cwd()

    def work(_: int) -> dict[str, str]:
        try:
            os.chdir(here)  # relative names, also of the weights, mean what they mean here
        except OSError as error:
            return {"error": f"{here} on {platform.node()}: {error.strerror}; workers need it too"}
        return {"error": _work(job, threads)}

    encoder = load_encoder(job.config)
    cache = FeatureCache(
        job.folder,
        encoder,
        storage=job.config.storage,
        views=job.config.views,
        view_kind=job.config.view_kind,
    )
    with _shown(cache):
        ended = under_ray(work, workers, workers=workers, cpus=threads, shares_gpus=True)
        errors = [row["error"] for _, row in ended if row["error"]]
    if errors:
        raise CloverError(errors[0])
    found = job.run(encoder)
    found.cache.set_aside = cache.set_aside + found.cache.set_aside
    return found


@contextlib.contextmanager
def _shown(cache: FeatureCache) -> Iterator[None]:
    """Show how many images the cache holds while others fill it."""
    is_over = threading.Event()
    with progress("features", None, done=len(cache)) as advance:

        def look() -> None:
            was_last = False
            while not was_last:
                was_last = is_over.wait(_LOOK_S)
                before = len(cache)
                cache.refresh()
                advance(len(cache) - before)

        watch = threading.Thread(target=look, daemon=True)
        watch.start()
        try:
            yield
        finally:
            is_over.set()
            watch.join()


def _work(job: FillJob, threads: int) -> str:
    """Fill in this process, one of several; return what the person has to put right.

    A process of `fill` need not: the one that the person started meets the same.
    """
    torch.set_num_threads(threads)
    try:
        job.run()
    except CloverError as error:
        return str(error)
    return ""
