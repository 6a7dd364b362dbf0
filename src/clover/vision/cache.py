"""What the frozen encoder saw, computed once (DESIGN, section 3: feature shard).

A folder holds one subfolder an encoder; in it safetensors shards of float16 tokens and, beside each
shard, a JSON index of the SHA-256 of the image bytes in it. The index is written last: a shard
without one is unfinished and is made again. Another encoder, other weights, another token map or
other image bytes are a miss, never a wrong hit.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clover.core.errors import CloverError
from clover.core.files import atomic_path, fingerprint, read_json, write_json
from clover.core.record import Record, Rejection
from clover.core.terminal import progress
from clover.slides.picture import is_region, read_region, region_digest
from clover.vision.encoder import ImageEncoder

_SHARD = 128  # images a shard: what a crash can cost


class FeatureCache:
    """Tokens [P, E] by image content.

    Args:
        folder: Where caches lie; made when absent.
        encoder: Names the subfolder.
    """

    def __init__(self, folder: str | Path, encoder: ImageEncoder) -> None:
        key = fingerprint([encoder.id, encoder.revision])
        stem = re.sub(r"[^\w.]+", "-", encoder.id)
        self.path = Path(folder) / f"{stem}-{key}"
        self.path.mkdir(parents=True, exist_ok=True)
        self._encoder = encoder
        self._where: dict[str, tuple[Path, int]] = {}
        self._open: dict[Path, Tensor] = {}
        for index in sorted(self.path.glob("shard-*.json")):
            self._register(index)

    def __len__(self) -> int:
        """Number of images in the cache."""
        return len(self._where)

    def __contains__(self, digest: object) -> bool:
        """Return whether the image with this hash is in the cache."""
        return digest in self._where

    def _register(self, index: Path) -> None:
        shard = index.with_suffix(".safetensors")
        if shard.exists():
            for row, digest in enumerate(read_json(index)["images"]):
                self._where[digest] = (shard, row)

    def get(self, digests: Sequence[str]) -> Tensor:
        """Return tokens [B, P, E], float32, of images by hash; all must be in the cache."""
        rows = []
        for digest in digests:
            shard, row = self._where[digest]
            if shard not in self._open:
                with safe_open(str(shard), "pt") as handle:
                    # safetensors maps the file: only the rows that are read cost memory.
                    self._open[shard] = handle.get_tensor("tokens")
            rows.append(self._open[shard][row])
        return torch.stack(rows).float()

    def fill(self, images: dict[str, Path]) -> list[Rejection]:
        """Encode the images that are missing.

        Args:
            images: SHA-256 -> path.

        Returns:
            Images that could not be decoded, with the reason.
        """
        missing = [digest for digest in images if digest not in self]
        rejected: list[Rejection] = []
        number = 1 + max(
            # By the indices: a shard without one is unfinished, and its place is taken.
            (int(path.stem.split("-")[1]) for path in self.path.glob("shard-*.json")),
            default=-1,
        )
        with (
            progress("features", len(missing)) as advance,
            ThreadPoolExecutor(max_workers=2) as pool,
        ):
            for start in range(0, len(missing), _SHARD):
                digests: list[str] = []
                parts: list[Tensor] = []
                for found, pixels in self._batches(
                    missing[start : start + _SHARD], images, pool, rejected
                ):
                    parts.append(self._encoder.encode(pixels).half())
                    digests += found
                    advance(len(found))
                if digests:
                    self._write(number, digests, torch.cat(parts))
                    number += 1
        return rejected

    def _batches(
        self,
        digests: Sequence[str],
        images: dict[str, Path],
        pool: ThreadPoolExecutor,
        rejected: list[Rejection],
    ) -> Iterator[tuple[list[str], Tensor]]:
        """Yield decoded batches; what cannot be decoded goes to `rejected`."""
        size = self._encoder.batch_size
        decoded = pool.map(lambda digest: self._decode(images[digest]), digests)
        names: list[str] = []
        pixels: list[Tensor] = []
        for digest, found in zip(digests, decoded, strict=True):
            if isinstance(found, Rejection):
                rejected.append(found)
                continue
            names.append(digest)
            pixels.append(found)
            if len(names) == size:
                yield names, torch.stack(pixels)
                names, pixels = [], []
        if names:
            yield names, torch.stack(pixels)

    def _decode(self, path: Path) -> Tensor | Rejection:
        try:
            if is_region(path):
                return self._encoder.prepare(read_region(path, self._encoder.microns_per_pixel))
            with Image.open(path) as image:
                return self._encoder.prepare(image)
        except CloverError as error:
            return Rejection(str(path), 0, "unreadable region of a slide", str(error))
        except UnidentifiedImageError:
            reason = "of no known format"
        except Image.DecompressionBombError:
            reason = "too many pixels"
        except (OSError, SyntaxError, ValueError):
            reason = "cut off or damaged"
        return Rejection(str(path), 0, f"broken image ({reason})")

    def _write(self, number: int, digests: list[str], tokens: Tensor) -> None:
        shard = self.path / f"shard-{number:05d}.safetensors"
        with atomic_path(shard) as partial:
            save_file({"tokens": tokens.contiguous()}, str(partial))
        index = shard.with_suffix(".json")
        write_json(index, {"images": digests, "encoder": self._encoder.id})
        self._register(index)

    def verify(self) -> list[Path]:
        """Return the shards that cannot be read whole, after forgetting them."""
        broken = []
        for index in sorted(self.path.glob("shard-*.json")):
            shard = index.with_suffix(".safetensors")
            try:
                with safe_open(str(shard), "pt") as handle:
                    size = handle.get_slice("tokens").get_shape()[0]
                is_whole = size == len(read_json(index)["images"])
            except (OSError, SafetensorError):
                is_whole = False
            if not is_whole:
                broken.append(shard)
                index.unlink(missing_ok=True)
                shard.unlink(missing_ok=True)
                self._where = {k: v for k, v in self._where.items() if v[0] != shard}
        return broken


def hash_images(
    records: Sequence[Record], folder: Path, *, microns_per_pixel: float | None = None
) -> tuple[dict[str, str], dict[str, Path], list[Rejection]]:
    """Hash the images of records.

    Args:
        records: Their images are paths, or regions of slides.
        folder: Where relative paths start.
        microns_per_pixel: At which the encoder reads regions; a part of their hash.

    Returns:
        image name -> SHA-256; SHA-256 -> one path with these bytes; missing images, and regions
        that name no place.
    """
    digests: dict[str, str] = {}
    paths: dict[str, Path] = {}
    rejected: list[Rejection] = []
    failed: set[str] = set()
    for record in records:
        name = record.image
        if name is None or name in digests or name in failed:
            continue
        path = folder / name
        try:
            if not is_region(path):
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
            elif microns_per_pixel is None:
                raise CloverError("region of a slide, but encoder.microns_per_pixel is not set")
            else:
                digest = region_digest(path, microns_per_pixel)
        except (OSError, CloverError) as error:
            failed.add(name)
            reason = "missing image" if isinstance(error, OSError) else str(error)
            rejected.append(Rejection(str(path), 0, reason))
            continue
        digests[name] = digest
        paths.setdefault(digest, path)
    return digests, paths, rejected
