"""Records joined with their cached features: what both training stages and evaluation read."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clover.core.digests import DigestMemory
from clover.core.errors import CloverError
from clover.core.memory import give_freed_memory_back
from clover.core.record import Needs, Record, Rejection, set_aside
from clover.core.record_file import open_records, select
from clover.vision.cache import FeatureCache, ViewKind
from clover.vision.encoder import ImageEncoder
from clover.vision.hashes import Digests, ImageHashes, ImagePaths
from clover.vision.read_ahead import Coming, ReadAhead
from clover.vision.storage import Storage


class _Announced(NamedTuple):
    """A batch that `features` will be asked for."""

    indices: list[int]
    views: list[int]
    coming: Future[Coming] | None
    """On its way to a GPU."""


@dataclass
class FeatureSet:
    """Records whose images are in the cache.

    Attributes:
        records: Usable records, in file order.
        digests: SHA-256 of each record's image bytes.
        cache: Where the features lie.
        rejected: What was set aside: bad lines, missing and broken images.
        images: The folder that image paths start from.
    """

    records: Sequence[Record]
    digests: Digests
    cache: FeatureCache
    rejected: list[Rejection]
    images: Path
    _announced: deque[_Announced] = field(default_factory=deque, init=False)
    """What comes next."""
    _ahead: ReadAhead | None = field(default=None, init=False)

    def send_to(self, device: torch.device) -> None:
        """Have `features` return tensors of this device; a GPU's are copied beside the steps."""
        if device.type == "cuda":
            self._ahead = ReadAhead(self.cache.page_locked, device)

    def announce(self, indices: Sequence[int], draws: Sequence[int]) -> None:
        """Say that `features` will soon be asked for these records, in this order of calls.

        Args:
            indices: The records' [B].
            draws: A random number for each [B], which chooses its view.
        """
        views = [draw % self.cache.views for draw in draws]
        digests = [self.digests[index] for index in indices]
        coming = None if self._ahead is None else self._ahead.start(digests, views)
        self._announced.append(_Announced(list(indices), views, coming))
        if coming is None:
            self.cache.announce(digests, views)

    def features(self, indices: Sequence[int]) -> Tensor:
        """Return tokens [B, P, E] of the records with these indices.

        Where the cache holds several views, one of each record: the announced one, or one drawn
        from torch's generator.
        """
        announced = self._take_announced(list(indices))
        if announced is not None and announced.coming is not None and self._ahead is not None:
            return self._ahead.take(announced.coming.result())
        views = None if announced is None else announced.views
        if views is None and self.cache.views > 1:
            views = torch.randint(self.cache.views, (len(indices),)).tolist()
        digests = [self.digests[index] for index in indices]
        if self._ahead is not None:
            return self._ahead.now(digests, views)
        return self.cache.get(digests, views)

    def _take_announced(self, indices: list[int]) -> _Announced | None:
        for place, announced in enumerate(self._announced):
            if announced.indices == indices:
                for _ in range(place + 1):  # what was not asked for before will not be
                    self._announced.popleft()
                return announced
        return None

    def evenly(self, number: int) -> FeatureSet:
        """Return at most so many records, evenly spaced: files are often sorted by image."""
        size = len(self.records)
        rows = [place * size // number for place in range(number)] if number < size else range(size)
        return replace(
            self,
            records=[self.records[row] for row in rows],
            digests=Digests(self.digests.values[list(rows)]),
        )

    def named(self) -> dict[str, str]:
        """Return what tells these images and features from others, by what each is called."""
        return {
            "records with an image": f"{len(self.records)}",
            "the images' sha256": self.digests.fingerprint(),
            "the features": self.cache.path.name,
        }

    def summary(self) -> str:
        """Return how many records are usable, and what was set aside."""
        images = self.digests.num_distinct()
        return f"{len(self.records):,} records on {images:,} images{set_aside(self.rejected)}"


def load_feature_set(
    path: str | Path,
    *,
    needs: Needs,
    encoder: ImageEncoder,
    cache: str | Path,
    images: Path | None = None,
    storage: Storage = "float16",
    views: int = 1,
    view_kind: ViewKind = "crop",
) -> FeatureSet:
    """Read records, encode the images that are not cached yet, and join the two.

    A million records of JSON Lines need some 100 bytes each: they are parsed when they are used.

    Args:
        path: The records: a file, or a folder of JSON Lines or Parquet files.
        needs: Which columns each must fill.
        encoder: Of the images.
        cache: The folder of caches.
        images: Where image paths start; the records' own folder by default.
        storage: Number format of the cache.
        views: Views an image that `features` draws from.
        view_kind: How they are made.

    Raises:
        CloverError: nothing usable is left.
    """
    folder = _images_of(path, images)
    features = FeatureCache(cache, encoder, storage=storage, views=views, view_kind=view_kind)
    hashes = ImageHashes(
        folder,
        microns_per_pixel=encoder.microns_per_pixel,
        memory=DigestMemory(Path(cache) / "digests.sqlite"),
    )
    records, digests, rejected = _hashed(path, needs, hashes, Path(cache) / "records")
    if not features.are_whole(digests).all():
        rejected += features.fill(ImagePaths(records, digests, folder))
        is_whole = features.are_whole(digests)
        records, digests = select(records, is_whole), digests[is_whole]
    _check_some(records, rejected, path, folder)
    del hashes
    give_freed_memory_back()
    return FeatureSet(records, Digests(digests), features, rejected, folder)


def _images_of(path: str | Path, images: Path | None) -> Path:
    """Return where image paths start: where one says, or the records' own folder."""
    path = Path(path)
    return images if images is not None else path if path.is_dir() else path.parent


def _hashed(
    path: str | Path, needs: Needs, hashes: ImageHashes, unpacked: Path | None
) -> tuple[Sequence[Record], npt.NDArray[np.uint8], list[Rejection]]:
    """Return the records whose images are there, their SHA-256 [N, 32], and what was set aside."""
    found, rejected = open_records(path, needs=needs, visit=hashes.add, unpacked=unpacked)
    digests, is_there = hashes.values()
    return select(found, is_there), digests[is_there], [*rejected, *hashes.rejected]


def _check_some(
    records: Sequence[Record], rejected: Sequence[Rejection], path: str | Path, folder: Path
) -> None:
    if not len(records):
        reason = rejected[-1].reason if rejected else "no record names an image"
        raise CloverError(f"{path}: no record with a readable image under {folder} ({reason})")


@dataclass(frozen=True)
class ImageSet:
    """Records whose images are there; no features.

    Attributes:
        records: Usable records, in file order.
        digests: SHA-256 of each record's image bytes.
        rejected: What was set aside.
        images: The folder that image paths start from.
    """

    records: list[Record]
    digests: list[str]
    rejected: list[Rejection]
    images: Path

    def summary(self) -> str:
        """Return how many records are usable, and what was set aside."""
        images = len(set(self.digests))
        return f"{len(self.records):,} records on {images:,} images{set_aside(self.rejected)}"


def load_image_set(
    path: Path,
    images: Path | None = None,
    *,
    needs: Needs = "any",
    unpacked: Path | None = None,
    microns_per_pixel: float | None = None,
) -> ImageSet:
    """Read records and hash their images; nothing is encoded.

    Args:
        path: A file of records, or a folder of such files.
        images: Where image paths start; the records' own folder by default.
        needs: Which columns each must fill.
        unpacked: The folder for Parquet files as JSON Lines; without one Parquet is refused.
        microns_per_pixel: At which regions of slides are read; without it they are set aside.

    Raises:
        CloverError: nothing usable is left.
    """
    folder = _images_of(path, images)
    hashes = ImageHashes(folder, microns_per_pixel=microns_per_pixel)
    records, digests, rejected = _hashed(path, needs, hashes, unpacked)
    _check_some(records, rejected, path, folder)
    return ImageSet(list(records), list(Digests(digests)), rejected, folder)
