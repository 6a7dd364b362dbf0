"""Several processes that fill one cache; each encodes what no other has claimed."""

from __future__ import annotations

import contextlib
import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import torch

from clover.core.config import EncoderConfig
from clover.core.errors import CloverError
from clover.vision.dataset import FeatureSet, load_feature_set
from clover.vision.encoder import load_encoder


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

    def run(self) -> FeatureSet:
        """Encode what is missing, in this process.

        Raises:
            CloverError: no usable image, or a disk that is full.
        """
        return load_feature_set(
            self.data,
            needs="any",
            encoder=load_encoder(self.config),
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


def _work(job: FillJob, threads: int) -> None:
    torch.set_num_threads(threads)
    with contextlib.suppress(CloverError):  # said once, by the process that the person started
        job.run()
