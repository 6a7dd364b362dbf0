"""What the frozen encoder saw, computed once (DESIGN, section 3: feature shard).

A folder holds one subfolder an encoder and number format; in it lie shards (`shard`). The key of a
row is the SHA-256 of the image's bytes, and behind it the view, where it is not the image as it is.
Another encoder, other weights, another token map, another view or other image bytes are a miss,
never a wrong hit. Several processes may fill one folder: each claims a shard's worth of images at a
time.
"""

from __future__ import annotations

import itertools
import os
import re
from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from clover.core.decoding import UnreadableImage
from clover.core.errors import CloverError
from clover.core.files import fingerprint
from clover.core.memory import keep_freed_memory
from clover.core.record import Rejection
from clover.core.terminal import progress
from clover.slides.picture import decoded, is_region, read_region
from clover.vision.claim import Claims, number_of
from clover.vision.encoder import ImageEncoder
from clover.vision.image_processor import draw_view, rand_augment, turn_view
from clover.vision.places import KEY, LAST_VIEW, Bytes, Integers, Places, digest_array, make_keys
from clover.vision.portraits import decoders
from clover.vision.shard import Shard, open_shard, write_shard
from clover.vision.storage import Storage, are_finite, pack

_SHARD = 128  # images a shard: what a crash can cost
_AHEAD = 64  # images decoded ahead of the encoder, at least; their shards are claimed by then
ViewKind = Literal["crop", "augment", "turn"]
_VIEWS: dict[ViewKind, str] = {"crop": "crop2", "augment": "augment1", "turn": "turn1"}
"""How views are made, as a part of the key: crop and flip (SPEC, section 3.3: `blip2_image_train`),
these and RandAugment (`blip_image_train`), or quarter turns and mirror images."""


@dataclass
class _Job:
    """A shard in the making."""

    number: int
    """Its claim."""
    left: int
    """Images that are not decoded yet."""
    encoding: int = 0
    """Batches of it that are being encoded."""
    waiting: dict[str, Tensor] = field(default_factory=dict)
    """Key -> pixels of what is decoded."""
    keys: list[str] = field(default_factory=list)
    """Of what is encoded."""
    parts: list[dict[str, Tensor]] = field(default_factory=list)
    """Packed tokens of each."""


Collect = Callable[[], list[dict[str, Tensor] | None]]
_WHOLE = "whole"


class FeatureCache:
    """Tokens [P, E] by image content.

    Args:
        folder: Where caches lie; made when absent.
        encoder: Names the subfolder.
        storage: Number format of what is written; another one is another subfolder.
        views: Views an image: the image as it is, and others made of it.
        view_kind: How the others are made: random crops, with RandAugment or without, or quarter
            turns and mirror images.

    Attributes:
        path: The subfolder.
        views: Views an image.
        set_aside: Torn shards that were found on opening, where they lie now.
        num_encoded: Images encoded by this object.
    """

    def __init__(
        self,
        folder: str | Path,
        encoder: ImageEncoder,
        *,
        storage: Storage = "float16",
        views: int = 1,
        view_kind: ViewKind = "crop",
    ) -> None:
        key = fingerprint([encoder.id, encoder.revision])
        stem = re.sub(r"[^\w.]+", "-", encoder.id)
        # float16 has no suffix: caches of the first release are of it.
        suffix = "" if storage == "float16" else f"-{storage}"
        self.path = Path(folder) / f"{stem}-{key}{suffix}"
        self.path.mkdir(parents=True, exist_ok=True)
        self.views = views
        self._view_kind = view_kind
        self.set_aside: list[Path] = []
        self.num_encoded = 0
        self._encoder = encoder
        self._storage: Storage = storage
        self._shards: list[Shard] = []
        self._places = Places()
        self._known: set[str] = set()
        self._side = 0
        self.refresh()

    def __len__(self) -> int:
        """Number of images in the cache."""
        return self._places.count(view=0)

    def __contains__(self, digest: object) -> bool:
        """Return whether the image with this hash is in the cache."""
        return isinstance(digest, str) and not self.missing([digest])

    def refresh(self) -> None:
        """Take up what other processes have written; set torn shards aside."""
        names = {
            entry.name
            for entry in os.scandir(self.path)
            if entry.name.startswith("shard-") and entry.name.endswith(".json")
        }
        for name in sorted(names - self._known):
            index = self.path / name
            if not index.exists():  # another set it aside meanwhile
                continue
            shard, keys = open_shard(index)
            if shard.is_torn():
                self.set_aside.append(shard.set_aside())
            else:
                self._register(shard, keys)

    def _register(self, shard: Shard, keys: Sequence[str]) -> None:
        self._known.add(shard.index.name)
        packed, rows = _packed(keys, self._view_kind)
        self._places.add(len(self._shards), packed, rows)
        self._shards.append(shard)

    def _forget(self, number: int) -> None:
        self._known.discard(self._shards[number].index.name)
        self._places.drop(number)

    def _key(self, digest: str, view: int) -> str:
        """Return a row's key; the image as it is has its digest alone."""
        return f"{digest}@{_VIEWS[self._view_kind]}.{view}" if view else digest

    def is_whole(self, digest: str) -> bool:
        """Return whether all views of an image are in the cache."""
        return bool(self.are_whole(digest_array([bytes.fromhex(digest)]))[0])

    def are_whole(self, digests: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """Return which images [N] are in the cache with all views, by their SHA-256 [N, 32]."""
        whole = np.ones(len(digests), bool)
        for view in range(self.views):
            whole &= self._places.find(make_keys(digests, view))[0] >= 0
        return whole

    def get(self, digests: Sequence[str], views: Sequence[int] | None = None) -> Tensor:
        """Return tokens [B, P, E], float32, of images by hash; all must be in the cache.

        Args:
            digests: Of the images' bytes.
            views: Which view of each; the images as they are by default.

        Raises:
            CloverError: a shard has flipped bits; it is set aside and named.
            KeyError: an image is not in the cache.
        """
        return torch.stack(
            [self._shards[shard].read(row) for shard, row in self._find(digests, views)]
        )

    def page_locked(
        self, digests: Sequence[str], views: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Return what is stored of these images [B, ...] in memory that a GPU can copy from alone.

        Args and errors are those of `get`.
        """
        found: dict[str, Tensor] = {}
        for place, (shard, row) in enumerate(self._find(digests, views)):
            for name, item in self._shards[shard].stored(row).items():
                if name not in found:
                    shape = (len(digests), *item.shape)
                    found[name] = torch.empty(shape, dtype=item.dtype, pin_memory=True)
                found[name][place] = item
        return found

    def announce(self, digests: Sequence[str], views: Sequence[int] | None = None) -> None:
        """Say that `get` will soon be asked for these: the disk is read beside other work."""
        rows_of: dict[int, list[int]] = defaultdict(list)
        for shard, row in self._find(digests, views):
            rows_of[shard].append(row)
        for shard, rows in rows_of.items():
            self._shards[shard].announce(rows)

    def _find(
        self, digests: Sequence[str], views: Sequence[int] | None
    ) -> Iterator[tuple[int, int]]:
        """Yield the number of each image's shard, and its row."""
        chosen = views if views is not None else [0] * len(digests)
        keys = [self._key(*pair) for pair in zip(digests, chosen, strict=True)]
        shards, rows = self._places.find(_packed(keys, self._view_kind)[0])
        for key, shard, row in zip(keys, shards.tolist(), rows.tolist(), strict=True):
            if shard < 0:
                raise KeyError(key)
            yield shard, row

    def fill(self, images: Mapping[str, Path]) -> list[Rejection]:
        """Encode the images that are missing; images that others encode are waited for.

        Args:
            images: SHA-256 -> path.

        Returns:
            Images that could not be decoded, or whose tokens are not finite, with the reason.

        Raises:
            CloverError: the disk is full; the shards before are kept.
        """
        # Cut by what is asked for, not by what is missing: every process cuts alike.
        chunks = [chunk for chunk in self._chunks(images) if self.missing(chunk)]
        if not chunks:
            return []
        missing = sum(len(self.missing(chunk)) for chunk in chunks)
        keep_freed_memory()
        with (
            progress("features", missing) as advance,
            Claims(self.path / "claims.lock") as claims,
            decoders() as pool,
            ThreadPoolExecutor(max_workers=1) as writer,
        ):
            run = _Fill(self, images, claims, pool, writer, advance)
            try:
                run.encode(run.claimed(chunks))
                for chunk in list(run.busy):  # one at a time: nothing is held while waiting
                    run.encode(run.claimed([chunk], wait=True))
            finally:
                pool.shutdown(cancel_futures=True)
        return list(run.rejected.values())

    def _chunks(self, images: Iterable[str]) -> Iterator[list[str]]:
        """Yield a shard's worth of keys at a time: first the images as they are."""
        keys = (self._key(digest, view) for view in range(self.views) for digest in images)
        while chunk := list(itertools.islice(keys, _SHARD)):
            yield chunk

    def decode(self, path: Path, key: str) -> Tensor | Rejection:
        """Return one view of an image as the encoder wants it [3, S, S], or why not."""
        digest, _, view = key.partition("@")
        try:
            if is_region(path):
                image = read_region(path, self._encoder.microns_per_pixel)
            else:
                image = decoded(path)
        except UnreadableImage as error:
            return Rejection(str(path), 0, f"{error.kind} ({error.reason})")
        except CloverError as error:
            return Rejection(str(path), 0, "unreadable region of a slide", str(error))
        except FileNotFoundError:  # it was there when it was hashed
            return Rejection(str(path), 0, "missing image")
        return self._prepare(image, digest, view)

    def _prepare(self, image: Image.Image, digest: str, view: str) -> Tensor:
        if not view:
            return self._encoder.prepare(image)
        if not self._side:
            self._side = self._encoder.prepare(Image.new("RGB", (64, 64))).shape[-1]
        number = int(view.rpartition(".")[2])
        if self._view_kind == "turn":
            return self._encoder.prepare(turn_view(image, number))
        random = np.random.default_rng([int(digest[:16], 16), number])
        drawn = draw_view(image, self._side, random)
        if self._view_kind == "augment":
            drawn = rand_augment(drawn, random)
        return self._encoder.prepare(drawn)

    def encode(self, pixels: Sequence[Tensor]) -> Collect:
        """Begin to encode B images [3, S, S]; on a CPU it is done at once.

        Returns:
            What waits for it and returns packed tokens of each image; None in the place of those
            that are no finite numbers.
        """
        self.num_encoded += len(pixels)
        if self.is_on_gpu:
            return _encode_on_gpu(self._encoder, pixels, self._storage)
        parts = self._encode_here(pixels)
        return lambda: parts

    @property
    def is_on_gpu(self) -> bool:
        """Whether the encoder works beside this thread."""
        device = getattr(self._encoder, "device", None)
        return isinstance(device, torch.device) and device.type == "cuda"

    def _encode_here(self, pixels: Sequence[Tensor]) -> list[dict[str, Tensor] | None]:
        tokens = self._encoder.encode(torch.stack(list(pixels)))
        # One by one: what is made on the way stays in the processor's cache, and no batch of
        # EVA-g's tokens is copied together again.
        packed = (pack(image, self._storage) for image in torch.split(tokens, 1))
        return [part if are_finite(part) else None for part in packed]

    def write(self, keys: list[str], parts: Sequence[dict[str, Tensor]]) -> Shard:
        """Write a shard; it is registered by the caller."""
        path = self.path / f"shard-{fingerprint(keys)}.safetensors"
        return write_shard(path, keys, parts, storage=self._storage, encoder=self._encoder.id)

    @property
    def encoder_id(self) -> str:
        """The encoder's name."""
        return self._encoder.id

    @property
    def not_finite(self) -> str:
        """Why an image is set aside whose tokens cannot be kept."""
        return (
            f"its tokens are not all finite numbers in {self._storage}; see encoder.mean, "
            "encoder.std, encoder.numbers, or take encoder.storage=bfloat16"
        )

    @property
    def batch_size(self) -> int:
        """Images a pass of the encoder."""
        return self._encoder.batch_size

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Return those that are not in the cache."""
        shards, _ = self._places.find(_packed(keys, self._view_kind)[0])
        return [key for key, shard in zip(keys, shards.tolist(), strict=True) if shard < 0]

    def verify(self) -> list[Path]:
        """Read every shard through; return those that are damaged, after setting them aside."""
        broken = []
        for number, shard in enumerate(self._shards):
            if shard.index.name in self._known and shard.damage() is not None:
                shard.set_aside()
                self._forget(number)
                broken.append(shard.path)
        torn = [path.parents[1] / path.name for path in self.set_aside]
        self.set_aside = []
        return torn + sorted(broken)


def _encode_on_gpu(encoder: Any, pixels: Sequence[Tensor], storage: Storage) -> Collect:
    """Encode and pack on the GPU, and begin to copy what is stored, in half the bytes or less."""
    images = torch.empty((len(pixels), *pixels[0].shape), dtype=pixels[0].dtype, pin_memory=True)
    packed = pack(encoder.encode_there(torch.stack(list(pixels), out=images)), storage)
    stored = {
        name: torch.empty(item.shape, dtype=item.dtype, pin_memory=True).copy_(
            item, non_blocking=True
        )
        for name, item in {**packed, _WHOLE: are_finite(packed)}.items()
    }
    done = torch.cuda.current_stream(encoder.device).record_event()

    def collect() -> list[dict[str, Tensor] | None]:
        done.synchronize()
        is_whole = stored.pop(_WHOLE).tolist()
        rows = ({name: item[row : row + 1] for name, item in stored.items()}
                for row in range(len(is_whole)))  # fmt: skip
        return [part if kept else None for part, kept in zip(rows, is_whole, strict=True)]

    return collect


class _Fill:
    """One call of `FeatureCache.fill`."""

    def __init__(
        self,
        cache: FeatureCache,
        images: Mapping[str, Path],
        claims: Claims,
        pool: ThreadPoolExecutor,
        writer: ThreadPoolExecutor,
        advance: Callable[..., None],
    ) -> None:
        self.busy: list[list[str]] = []
        """Chunks that another process had claimed."""
        self.rejected: dict[Path, Rejection] = {}
        self._cache, self._images, self._claims = cache, images, claims
        self._pool, self._writer, self._advance = pool, writer, advance
        self._written: Future[tuple[Shard, _Job]] | None = None
        self._begun: deque[tuple[_Job, list[str], Collect]] = deque()
        """Batches that are encoded; a GPU has one while the one before is taken in."""

    def claimed(
        self, chunks: Sequence[list[str]], *, wait: bool = False
    ) -> Iterator[tuple[_Job, str]]:
        """Yield what is missing of each chunk that nobody else works on."""
        for chunk in chunks:
            if not self._cache.missing(chunk):
                continue
            number = number_of(chunk)
            if not self._claims.take(number, wait=wait):
                self.busy.append(chunk)
                continue
            self._cache.refresh()  # who had it before may have finished it
            missing = self._cache.missing(chunk)
            if not missing:
                self._claims.give_back(number)
            job = _Job(number, len(missing))
            for key in missing:
                yield job, key

    def encode(self, work: Iterator[tuple[_Job, str]]) -> None:
        """Encode and write; images are decoded ahead, also those of the next shard."""
        cache = self._cache
        ahead: deque[tuple[_Job, str, Future[Tensor | Rejection]]] = deque()
        while True:
            while len(ahead) < max(2 * cache.batch_size, _AHEAD):
                item = next(work, None)
                if item is None:
                    break
                job, key = item
                path = self._images[key.partition("@")[0]]
                ahead.append((job, key, self._pool.submit(cache.decode, path, key)))
            if not ahead:
                break
            job, key, future = ahead.popleft()
            found = future.result()
            job.left -= 1
            if isinstance(found, Rejection):
                self.rejected[self._images[key.partition("@")[0]]] = found
            else:
                job.waiting[key] = found
            if job.waiting and (len(job.waiting) == cache.batch_size or not job.left):
                self._encode(job)
            elif not job.left and not job.encoding:  # the last one could not be read
                self._write(job)
        while self._begun:
            self._collect()
        self._finish_writing()

    def _encode(self, job: _Job) -> None:
        keys, pixels = list(job.waiting), list(job.waiting.values())
        job.waiting = {}
        job.encoding += 1
        self._begun.append((job, keys, self._cache.encode(pixels)))
        while len(self._begun) > self._cache.is_on_gpu:
            self._collect()

    def _collect(self) -> None:
        """Take in the batch that was begun first; with a shard's last one, write it."""
        job, keys, collect = self._begun.popleft()
        for key, part in zip(keys, collect(), strict=True):
            if part is None:
                path = self._images[key.partition("@")[0]]
                self.rejected[path] = Rejection(str(path), 0, self._cache.not_finite)
            else:
                job.keys.append(key)
                job.parts.append(part)
        self._advance(len(keys))
        job.encoding -= 1
        if not job.left and not job.encoding:
            self._write(job)

    def _write(self, job: _Job) -> None:
        """Write a finished shard beside the encoder's work, one at a time."""
        self._finish_writing()
        if not job.keys:
            self._claims.give_back(job.number)
            return
        self._written = self._writer.submit(lambda: (self._cache.write(job.keys, job.parts), job))

    def _finish_writing(self) -> None:
        if self._written is None:
            return
        shard, job = self._written.result()
        self._written = None
        self._cache._register(shard, job.keys)
        self._claims.give_back(job.number)


def _packed(keys: Sequence[str], kind: ViewKind) -> tuple[Bytes, Integers]:
    """Return keys as `places` has them, and which of the given ones they are.

    A view of another kind is left out: a miss.
    """
    joined = "".join(keys)
    if len(joined) == 64 * len(keys) and "@" not in joined:  # all are images as they are
        digests = np.frombuffer(bytes.fromhex(joined), np.uint8).reshape(-1, 32)
        return make_keys(digests), np.arange(len(keys), dtype=np.int32)
    packed = bytearray()
    rows = array("i")
    for row, key in enumerate(keys):
        digest, _, view = key.partition("@")
        number = 0
        if view:
            how, _, digits = view.rpartition(".")
            if how != _VIEWS[kind] or not digits.isdigit() or int(digits) > LAST_VIEW:
                continue
            number = int(digits)
        packed += bytes.fromhex(digest) + number.to_bytes(2, "big")
        rows.append(row)
    return np.frombuffer(bytes(packed), KEY), np.frombuffer(rows, np.int32)
