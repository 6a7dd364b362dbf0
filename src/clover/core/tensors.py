"""Checkpoints read and written tensor by tensor: a file larger than memory is no problem.

Read: a safetensors file, a folder of them with an index, or a torch file that holds nothing but
tensors and plain values. Written: safetensors. A pickle is never run: torch files are opened with
its restricted reader, and only their table of contents is kept; each tensor is then read from its
place in the file.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clover.core.errors import CloverError
from clover.core.files import atomic_path, read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "bridge.safetensors", "align.safetensors", "pytorch_model.bin")
_MIB = 1 << 20


@dataclass(frozen=True)
class Place:
    """Where one tensor lies: file, first byte, number format and shape."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    """In elements; None for row after row."""

    @property
    def num_elements(self) -> int:
        """Number of values."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def num_bytes(self) -> int:
        """Bytes when written row after row."""
        return self.num_elements * self.dtype.itemsize

    def read(self) -> Tensor:
        """Read the tensor; nothing else of the file is touched.

        Raises:
            CloverError: the file ends early.
        """
        import torch

        if self.num_elements == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        count = self.num_elements
        if self.stride is not None:
            pairs = zip(self.shape, self.stride, strict=True)
            count = 1 + sum((size - 1) * step for size, step in pairs)
        buffer = bytearray(count * self.dtype.itemsize)
        with self.path.open("rb", buffering=0) as handle:
            handle.seek(self.offset)
            view, done = memoryview(buffer), 0
            while done < len(buffer):
                found = handle.readinto(view[done : done + 64 * _MIB])
                if not found:
                    raise CloverError(f"{self.path} is cut off: it ends inside a tensor")
                done += found
        flat = torch.frombuffer(buffer, dtype=self.dtype)
        if self.stride is not None:
            return flat.as_strided(self.shape, self.stride).contiguous()
        return flat.view(self.shape)


class TensorSource(Mapping[str, "Tensor"]):
    """The tensors of a checkpoint by name; each is read when it is asked for.

    Attributes:
        path: What was opened.
        places: Where each tensor lies.
    """

    def __init__(self, path: Path, places: dict[str, Place]) -> None:
        self.path = path
        self.places = places

    def __getitem__(self, name: str) -> Tensor:
        return self.places[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return self.places[name].shape

    def renamed(self, rename: Callable[[str], str | None]) -> TensorSource:
        """Return the source under other names; None leaves a tensor out."""
        found = {rename(name): place for name, place in self.places.items()}
        return TensorSource(self.path, {name: p for name, p in found.items() if name is not None})


def open_tensors(path: str | Path) -> TensorSource:
    """Open a checkpoint: a file, or a folder that holds one.

    Raises:
        CloverError: absent, cut off, of no known form, or a pickle that holds more than tensors.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise CloverError(f"no file {path}")
    return TensorSource(path, _open_file(path))


def _open_file(path: Path) -> dict[str, Place]:
    return _safetensors_places(path) if path.suffix == ".safetensors" else _torch_places(path)


def _open_folder(folder: Path) -> TensorSource:
    for name in _INDEX:
        if (folder / name).exists():
            parts = sorted(set(read_json(folder / name).get("weight_map", {}).values()))
            absent = [part for part in parts if not (folder / part).exists()]
            if absent:
                raise CloverError(
                    f"{folder / absent[0]} is missing ({len(absent)} of {len(parts)} files that "
                    f"{name} names); put it there"
                )
            places: dict[str, Place] = {}
            for part in parts:
                places |= _open_file(folder / part)
            return TensorSource(folder, places)
    for name in _SINGLE:
        if (folder / name).exists():
            return TensorSource(folder, _open_file(folder / name))
    raise CloverError(
        f"{folder} holds no weights: expected one of {', '.join((*_SINGLE, *_INDEX))}"
    )


def _safetensors_places(path: Path) -> dict[str, Place]:
    import torch

    size = path.stat().st_size
    try:
        with path.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > min(size, 100 * _MIB):
                raise ValueError("its header is longer than the file")
            header = json.loads(handle.read(length))
        places = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype = getattr(torch, _NAMES[entry["dtype"]])
            begin, end = entry["data_offsets"]
            place = Place(path, 8 + length + begin, dtype, tuple(entry["shape"]))
            if end - begin != place.num_bytes or 8 + length + end > size:
                raise ValueError(f"tensor {name} reaches past the end")
            places[name] = place
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CloverError(
            f"{path} is not a whole safetensors file ({error}): it is cut off or damaged; "
            "fetch it again"
        ) from error
    return places


def _torch_places(path: Path) -> dict[str, Place]:
    """Read the table of contents of a torch file; no tensor is read and no code is run."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle's protocol; what matters is raised
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise CloverError(
            f"{path} cannot be read as weights: {_reason(error)}; nothing was run. "
            "Use safetensors or a plain state dict"
        ) from error
    places: dict[str, Place] = {}
    for name, item in _flatten(loaded):
        storage = item.untyped_storage()
        start = getattr(storage, "_checkpoint_offset", None)
        if start is None:
            raise CloverError(
                f"{path} was written by a torch older than 1.6, or is compressed; open and save "
                "it once with a newer torch"
            )
        offset = start + item.storage_offset() * item.dtype.itemsize
        stride = None if item.is_contiguous() else tuple(item.stride())
        places[name] = Place(path, offset, item.dtype, tuple(item.shape), stride)
    if not places:
        raise CloverError(f"{path} holds no tensors")
    return places


def _reason(error: Exception) -> str:
    """Say in a few words why torch does not read a file."""
    asked = re.search(r"GLOBAL ([\w.]+)", str(error))
    if asked is not None:
        return f"it is torn, or holds more than tensors (a pickle that asks for {asked[1]})"
    return f"it is torn, or holds more than tensors ({type(error).__name__})"


def _flatten(loaded: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a state dict, bare or under the key `model` or `state_dict`."""
    import torch

    if not isinstance(loaded, dict):
        return
    for key in ("model", "state_dict"):
        if isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    for name, item in loaded.items():
        if isinstance(name, str) and isinstance(item, torch.Tensor):
            yield name, item


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its form is known before its values are."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def write_tensors(path: str | Path, entries: Iterable[Entry]) -> int:
    """Write a safetensors file, one tensor in memory at a time; return its bytes.

    Raises:
        CloverError: the disk refuses.
    """
    import torch

    names = {getattr(torch, theirs): ours for ours, theirs in _NAMES.items()}
    listed = sorted(entries, key=lambda entry: entry.name)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in listed:
        count = entry.dtype.itemsize
        for size in entry.shape:
            count *= size
        header[entry.name] = {
            "dtype": names[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [end, end + count],
        }
        end += count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as partial, partial.open("wb") as out:
        out.write(struct.pack("<Q", len(text)))
        out.write(text)
        for entry in listed:
            tensor = entry.read()
            assert tuple(tensor.shape) == entry.shape and tensor.dtype == entry.dtype, entry.name
            raw = tensor.contiguous().reshape(-1).view(torch.uint8)
            out.write(raw.numpy().data)
            del tensor, raw
    return 8 + len(text) + end
