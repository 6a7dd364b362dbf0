"""SHA-256 of the images that records name: what their features are found by.

In: names, some thousands at a time. Out: 32 bytes a record, and the images that are not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from clover.core.digests import DigestMemory
from clover.core.errors import CloverError
from clover.core.files import sha256_file
from clover.core.record import Record, Rejection
from clover.slides.picture import is_region, region_digest
from clover.vision.places import digest_array, first_words

_ABSENT = bytes(32)


class Digests(Sequence[str]):
    """SHA-256 in hex, kept as bytes [N, 32]."""

    def __init__(self, values: npt.NDArray[np.uint8]) -> None:
        self.values = values

    def __len__(self) -> int:
        """Number of hashes."""
        return len(self.values)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Digests: ...
    def __getitem__(self, index: int | slice) -> str | Digests:
        """Return one hash, or some."""
        if isinstance(index, slice):
            return Digests(self.values[index])
        digest: str = self.values[index].tobytes().hex()
        return digest

    def fingerprint(self) -> str:
        """Return one hash of all of them, in their order."""
        return hashlib.sha256(self.values.tobytes()).hexdigest()

    def num_distinct(self) -> int:
        """Return how many different ones there are."""
        words = first_words(self.values)
        rows = self.values[np.argsort(words)]
        is_new = (rows[1:] != rows[:-1]).any(axis=1)
        words = first_words(rows)
        if (is_new & (words[1:] == words[:-1])).any():  # by their beginnings they are not sorted
            return len(np.unique(np.ascontiguousarray(self.values).view("S32")))
        return int(is_new.sum()) + bool(len(rows))


class ImageHashes:
    """Collects the hashes of images by the names that records have for them.

    Args:
        folder: Where relative paths start.
        microns_per_pixel: At which the encoder reads regions; a part of their hash.
        memory: Hashes of files that have not changed since; without it every file is read.

    Attributes:
        rejected: Missing images, and regions that name no place, each once.
    """

    def __init__(
        self,
        folder: Path,
        *,
        microns_per_pixel: float | None = None,
        memory: DigestMemory | None = None,
    ) -> None:
        self.rejected: list[Rejection] = []
        self._folder, self._microns_per_pixel, self._memory = folder, microns_per_pixel, memory
        self._parts: list[bytes] = []
        self._failed: set[str] = set()

    def add(self, names: Sequence[str | None]) -> None:
        """Hash the images of the next records."""
        wanted = [n for n in dict.fromkeys(names) if n is not None and n not in self._failed]
        hashes = self._hash(wanted)
        if len(wanted) == len(names):
            with contextlib.suppress(TypeError):  # one that has no hash
                self._parts.append(b"".join(hashes))  # type: ignore[arg-type]
                return
        known: dict[str | None, bytes] = {}
        for name, found in zip(wanted, hashes, strict=True):
            if type(found) is bytes:
                known[name] = found
                continue
            self._failed.add(name)
            reason = "missing image" if isinstance(found, OSError) else str(found)
            self.rejected.append(Rejection(str(self._folder / name), 0, reason))
        self._parts.append(b"".join([known.get(name, _ABSENT) for name in names]))

    def _hash(self, names: Sequence[str]) -> Sequence[bytes | OSError | CloverError]:
        if "#" not in "\n".join(names):
            return self._read(names)
        # A # may begin a region; all other names are plain files.
        files = [name for name in names if "#" not in name]
        plain = dict(zip(files, self._read(files), strict=True))
        return [
            plain[name] if name in plain else self._region(self._folder / name) for name in names
        ]

    def _read(self, names: Sequence[str]) -> Sequence[bytes | OSError]:
        if self._memory is not None:
            return self._memory.digests(_joined(os.path.abspath(self._folder), names))
        return [_file_digest(self._folder / name) for name in names]

    def _region(self, path: Path) -> bytes | OSError | CloverError:
        try:
            if not is_region(path):
                return _file_digest(path)
            if self._microns_per_pixel is None:
                raise CloverError(
                    "region of a slide, and no µm per pixel to read it at: set "
                    "encoder.microns_per_pixel (of an endpoint: --microns-per-pixel)"
                )
            return bytes.fromhex(region_digest(path, self._microns_per_pixel))
        except (OSError, CloverError) as error:
            return error

    def values(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        """Return the hash of each record's image [N, 32], and which records have one [N]."""
        if self._memory is not None:
            self._memory.save()
        values = digest_array(self._parts)
        return values, np.asarray(values.any(axis=1))


def _joined(folder: str, names: Sequence[str]) -> list[str]:
    """Join as os.path does it, without its second for a million plain names."""
    text = "\n" + "\n".join(names)
    if "\n/" in text or "./" in text or "//" in text:
        return [os.path.normpath(os.path.join(folder, name)) for name in names]
    return [f"{folder}/{name}" for name in names]


def _file_digest(path: Path) -> bytes | OSError:
    try:
        return bytes.fromhex(sha256_file(path))
    except OSError as error:
        return error


class ImagePaths(Mapping[str, Path]):
    """SHA-256 in hex -> one path with these bytes, without a dictionary of a million.

    Args:
        records: With an image each.
        values: SHA-256 of their images [N, 32].
        folder: Where their paths start.
    """

    def __init__(
        self, records: Sequence[Record], values: npt.NDArray[np.uint8], folder: Path
    ) -> None:
        self._records, self._folder = records, folder
        keys = np.ascontiguousarray(values).view("S32").ravel()
        self._keys, self._first = np.unique(keys, return_index=True)
        self._digests = Digests(values[np.sort(self._first)])

    def __len__(self) -> int:
        """Number of different images."""
        return len(self._keys)

    def __iter__(self) -> Iterator[str]:
        """Yield the hashes in the order of the records."""
        return iter(self._digests)

    def __getitem__(self, digest: str) -> Path:
        """Return the path of the first record with this image."""
        key = np.frombuffer(bytes.fromhex(digest), "S32")[0]
        place = int(np.searchsorted(self._keys, key))
        if place == len(self._keys) or self._keys[place] != key:
            raise KeyError(digest)
        return self._folder / str(self._records[int(self._first[place])].image)
