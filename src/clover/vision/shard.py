"""One file of tokens and the index beside it, which says what is in it and how to tell damage.

The index is written last: a shard without one is unfinished. It holds the file's size (a torn shard
is seen when the cache is opened), its SHA-256 (`--verify`), and a CRC-32 of each image's bytes
(checked when an image is first read, so that flipped bits never reach training). Shards of the
first release have none of the three, and are read all the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clover.core.errors import CloverError
from clover.core.files import atomic_path, sha256_file, write_text
from clover.vision.storage import Storage, unpack

BROKEN = "broken"
"""The folder that damaged shards are moved to."""
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
        sha256: Of the file.
        sums: CRC-32 of each row.
    """

    path: Path
    num_rows: int
    size: int | None = None
    sha256: str | None = None
    sums: Sequence[int] | None = None
    _tensors: dict[str, Tensor] | None = None
    _checked: bytearray = field(default_factory=bytearray)

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
            with safe_open(str(self.path), "pt") as handle:
                rows = handle.get_slice("tokens").get_shape()[0]
        except (OSError, SafetensorError):
            return "torn"
        return None if rows == self.num_rows else "another number of images than its index"

    def read(self, row: int) -> Tensor:
        """Return one image's tokens [P, E], float32.

        Raises:
            CloverError: its bytes are not those that were written.
        """
        if self._tensors is None:
            try:
                with safe_open(str(self.path), "pt") as handle:
                    # safetensors maps the file: only the rows that are read cost memory.
                    self._tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise self._refused("cannot be read") from error
            self._checked = bytearray(self.num_rows)
        kept = {name: tensor[row] for name, tensor in self._tensors.items()}
        if self.sums is not None and not self._checked[row]:
            if _sum(kept) != self.sums[row]:
                raise self._refused("has flipped bits")
            self._checked[row] = 1
        return unpack(kept)

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


def _sum(kept: dict[str, Tensor]) -> int:
    """Return the CRC-32 of one row."""
    total = 0
    for name in sorted(kept):
        total = zlib.crc32(kept[name].reshape(-1).view(torch.uint8).numpy().data, total)
    return total


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
    digest, size = hashlib.sha256(), 0
    sums = array(
        "I",
        (
            _sum({name: item[row] for name, item in part.items()})
            for part in parts
            for row in range(len(part["tokens"]))
        ),
    )
    assert len(sums) == len(keys), f"{len(keys)} keys for {len(sums)} rows"
    with atomic_path(path) as partial, partial.open("wb") as handle:
        for piece in itertools.chain([memoryview(_header(parts))], _pieces(parts)):
            digest.update(piece)
            size += handle.write(piece)
    row = {
        "images": keys,
        "encoder": encoder,
        "storage": storage,
        "size": size,
        "sha256": digest.hexdigest(),
        "sums": sums.tolist(),
    }
    shard = Shard(path, len(keys), size, digest.hexdigest(), sums)
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
        numbers = None if sums is None else array("I", sums)
        return Shard(path, len(keys), row.get("size"), row.get("sha256"), numbers), keys
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return Shard(path, 0, size=-1), []  # a size that no file has: torn
