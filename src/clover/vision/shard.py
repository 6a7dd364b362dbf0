"""One file of tokens and the index beside it, which says what is in it and how to tell damage.

The index is written last: a shard without one is unfinished. It holds the file's size (a torn shard
is seen when the cache is opened) and a checksum of its header and of each image's bytes (checked
when an image is first read, so that flipped bits never reach training; all of them by `--verify`).
Shards of the releases before have other sums, or none, and are read all the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clover.core.errors import CloverError
from clover.core.files import atomic_path, sha256_file, write_text
from clover.vision.storage import Storage, unpack

Check = Literal["weighted64", "crc32"]

BROKEN = "broken"
"""The folder that damaged shards are moved to."""
_SHA256 = re.compile(r"[0-9a-f]{64}(@|$)")
_HEX = re.compile(r"[0-9a-f]*")
_WORDS = 1 << 64
_LONGEST_HEADER = 1 << 20
_DAMAGE = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError)
"""What reading a damaged header or index may raise."""
_NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int8: "I8",
}
"""What safetensors calls number formats."""


@dataclass
class Shard:
    """A file of tokens.

    Attributes:
        path: The safetensors file.
        num_rows: How many images it holds; which ones, its index says.
        size: Of the file in bytes; None in shards of the first release, as are the sums.
        sha256: Of the file, in shards whose rows have a CRC-32.
        header: Checksum of the file's header, in all others.
        sums: Checksum of each row.
        check: How rows are summed.
    """

    path: Path
    num_rows: int
    size: int | None = None
    sha256: str | None = None
    header: int | None = None
    sums: Sequence[int] | None = None
    check: Check = "weighted64"
    _tensors: dict[str, Tensor] | None = None
    _checked: bytearray = field(default_factory=bytearray)
    _extents: list[tuple[int, int]] | None = None
    """Where each tensor's first row starts in the file, and bytes a row."""

    @property
    def index(self) -> Path:
        """The index's file."""
        return self.path.with_suffix(".json")

    def is_torn(self) -> bool:
        """Return whether the file is not there, or not of its size."""
        try:
            size = self.path.stat().st_size
        except OSError:
            return True
        return self.size is not None and size != self.size

    def damage(self) -> str | None:
        """Read the file through; return what is wrong with it."""
        if self.is_torn():
            return "torn"
        try:
            if self.sha256 is not None:
                return None if sha256_file(self.path) == self.sha256 else "flipped bits"
            if self.header is not None and _header_sum(self.path) != self.header:
                return "flipped bits"
            tensors = self._open()
        except (OSError, SafetensorError):
            return "torn"
        if any(len(tensor) != self.num_rows for tensor in tensors.values()):
            return "another number of images than its index"
        are_whole = all(self._is_whole(row, tensors) for row in range(self.num_rows))
        return None if are_whole else "flipped bits"

    def _open(self) -> dict[str, Tensor]:
        with safe_open(str(self.path), "pt") as handle:
            # safetensors maps the file: only the rows that are read cost memory.
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118

    def _is_whole(self, row: int, tensors: dict[str, Tensor]) -> bool:
        if self.sums is None:
            return True
        kept = {name: tensor[row] for name, tensor in tensors.items()}
        return (_crc(kept) if self.check == "crc32" else checksum(kept)) == self.sums[row]

    def read(self, row: int) -> Tensor:
        """Return one image's tokens [P, E], float32.

        Raises:
            CloverError: its bytes are not those that were written.
        """
        return unpack(self.stored(row))

    def stored(self, row: int) -> dict[str, Tensor]:
        """Return one image's tokens as `storage.pack` made them, where the file is mapped.

        Raises:
            CloverError: its bytes are not those that were written.
        """
        # Several threads may read, one of which may set the file aside meanwhile.
        tensors = self._tensors
        if tensors is None:
            try:
                tensors = self._open()
            except (OSError, SafetensorError) as error:
                raise self._refused("cannot be read") from error
            if len(self._checked) != self.num_rows:
                self._checked = bytearray(self.num_rows)
            self._tensors = tensors
        if not self._checked[row]:
            if not self._is_whole(row, tensors):
                raise self._refused("has flipped bits")
            self._checked[row] = 1
        return {name: tensor[row] for name, tensor in tensors.items()}

    def announce(self, rows: Iterable[int]) -> None:
        """Ask the system to bring these rows into memory, and do not wait for them.

        Where it cannot be asked (other systems than Linux), or the file is damaged, nothing
        happens: `read` waits, or says what is wrong.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        with contextlib.suppress(*_DAMAGE), self.path.open("rb") as handle:
            if self._extents is None:
                self._extents = _extents(handle)
            for start, size in self._extents:
                for row in rows:
                    os.posix_fadvise(
                        handle.fileno(), start + row * size, size, os.POSIX_FADV_WILLNEED
                    )

    def set_aside(self) -> Path:
        """Move the file and its index into `broken/`; return where the file is now."""
        self._tensors = None
        folder = self.path.parent / BROKEN
        folder.mkdir(exist_ok=True)
        for path in (self.index, self.path):
            with contextlib.suppress(FileNotFoundError):  # another process was first
                path.replace(folder / path.name)
        return folder / self.path.name

    def _refused(self, problem: str) -> CloverError:
        aside = self.set_aside()
        return CloverError(
            f"{self.path.name} {problem} and is set aside as {aside}; run the same command again: "
            f"its {self.num_rows} images are encoded anew"
        )


def _crc(kept: dict[str, Tensor]) -> int:
    """Return the CRC-32 of one row, as the releases before summed it."""
    total = 0
    for name in sorted(kept):
        total = zlib.crc32(_bytes(kept[name]).data, total)
    return total


def checksum(kept: dict[str, Tensor]) -> int:
    """Return the checksum of one row: twenty times as quick as a CRC-32 of EVA-g's tokens.

    The sum over its 64-bit words, each times the odd number of its place, modulo 2^64. An odd
    factor can be undone, so a change within one word always changes the sum; of changes in several
    words one in 2^64 is missed. Against damage, not against malice.
    """
    total = 0
    for name in sorted(kept):
        total = (3 * total + _weighted(_bytes(kept[name]))) % _WORDS
    return total


def _bytes(tensor: Tensor) -> npt.NDArray[np.uint8]:
    found: npt.NDArray[np.uint8] = tensor.reshape(-1).view(torch.uint8).numpy()
    return found


def _weighted(content: npt.NDArray[np.uint8]) -> int:
    whole = len(content) // 8
    tail = int.from_bytes(content[8 * whole :].tobytes(), "little")
    words = content[: 8 * whole].view("<u8")
    return (int(np.dot(words, _odd(whole))) + (2 * whole + 1) * tail) % _WORDS


@cache
def _odd(count: int) -> npt.NDArray[np.uint64]:
    return np.arange(1, 2 * count, 2, dtype=np.uint64)


def _extents(handle: BinaryIO) -> list[tuple[int, int]]:
    """Return where each tensor's first row starts in a safetensors file, and bytes a row."""
    length = int.from_bytes(handle.read(8), "little")
    header = json.loads(handle.read(min(length, _LONGEST_HEADER)))
    found = []
    for name, row in header.items():
        if name != "__metadata__":
            start, end = row["data_offsets"]
            found.append((8 + length + start, (end - start) // max(1, row["shape"][0])))
    return found


def _header_sum(path: Path) -> int:
    with path.open("rb") as handle:
        length = handle.read(8)
        # A length that is damaged may be any number.
        header = length + handle.read(min(int.from_bytes(length, "little"), _LONGEST_HEADER))
    return _weighted(np.frombuffer(header, np.uint8))


def write_shard(
    path: Path,
    keys: list[str],
    parts: Sequence[dict[str, Tensor]],
    *,
    storage: Storage,
    encoder: str,
) -> Shard:
    """Write packed tokens, and then their index.

    The file is a safetensors file, written piece by piece: a copy of a whole shard in memory costs
    more time in fresh pages than the disk does (EVA-g's tokens: 92 MB a shard).

    Args:
        path: The file.
        keys: Of the rows.
        parts: What `storage.pack` made of a batch each, with as many rows in all as there are keys.
        storage: The number format; for the index.
        encoder: The encoder's name; for the index.

    Raises:
        CloverError: the disk is full; nothing of this shard is left.
    """
    sums = array(
        "Q",
        (
            checksum({name: item[row] for name, item in part.items()})
            for part in parts
            for row in range(len(part["tokens"]))
        ),
    )
    assert len(sums) == len(keys), f"{len(keys)} keys for {len(sums)} rows"
    header = _header(parts)
    with atomic_path(path) as partial, partial.open("wb") as handle:
        size = handle.write(header)
        for piece in _pieces(parts):
            size += handle.write(piece)
    shard = Shard(
        path, len(keys), size, header=_weighted(np.frombuffer(header, np.uint8)), sums=sums
    )
    row = {
        "images": keys,
        "encoder": encoder,
        "storage": storage,
        "size": size,
        "check": shard.check,
        "header": shard.header,
        "sums": sums.tolist(),
    }
    write_text(shard.index, json.dumps(row) + "\n")
    return shard


def _header(parts: Sequence[dict[str, Tensor]]) -> bytes:
    """Return a safetensors file's header: its length in eight bytes, then names and places."""
    names: dict[str, dict[str, object]] = {}
    start = 0
    for name, first in parts[0].items():
        end = start + sum(part[name].numel() * first.element_size() for part in parts)
        rows = sum(len(part[name]) for part in parts)
        names[name] = {
            "dtype": _NAMES[first.dtype],
            "shape": [rows, *first.shape[1:]],
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(names).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of eight, as the library wants
    return len(text).to_bytes(8, "little") + text


def _pieces(parts: Sequence[dict[str, Tensor]]) -> Iterator[memoryview]:
    """Yield the tensors' bytes, name after name, in the order of the parts."""
    for name in parts[0]:
        for part in parts:
            for row in part[name]:
                yield row.reshape(-1).view(torch.uint8).numpy().data


def open_shard(index: Path) -> tuple[Shard, list[str]]:
    """Return the shard that an index describes, and the keys of its rows in order.

    An index that cannot be read has no images.
    """
    path = index.with_suffix(".safetensors")
    try:
        row = json.loads(index.read_bytes())
        keys, sums = list(row["images"]), row.get("sums")
        joined = "".join(keys)
        is_plain = len(joined) == 64 * len(keys) and _HEX.fullmatch(joined) is not None
        is_plain = is_plain and set(map(len, keys)) <= {64}  # a view's is longer
        if not is_plain and not all(_SHA256.match(key) for key in keys):
            raise ValueError("a key that is no hash")
        shard = Shard(
            path,
            len(keys),
            row.get("size"),
            row.get("sha256"),
            row.get("header"),
            None if sums is None else array("Q", sums),
            row.get("check", "crc32"),
        )
        return shard, keys
    except _DAMAGE:
        return Shard(path, 0, size=-1), []  # a size that no file has: torn
