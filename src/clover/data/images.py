"""Where the images are: folders and zip files, looked through by the names that records give.

A record's image becomes a path relative to the written file's folder. What lies in a zip, or inside
a Parquet row, is written to `F-images/` beside the file, once.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from clover.core.errors import CloverError

_ENDINGS = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"II*\x00": ".tif", b"MM\x00*": ".tif"}
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


class ImageFinder:
    """Finds images by name.

    Attributes:
        num_broken: Members of zip files that could not be unpacked.
    """

    def __init__(self, roots: Sequence[Path], *, out: Path) -> None:
        """Take folders and zip files.

        Args:
            roots: Looked through in this order.
            out: The record file that the paths will be relative to.

        Raises:
            CloverError: a root that is neither a folder nor a zip file.
        """
        self.num_broken = 0
        self._base = out.parent.absolute()
        self._kept = self._base / f"{out.name.split('.')[0]}-images"
        self._folders = [str(root.absolute()) for root in roots if root.is_dir()]
        self._last: tuple[tuple[str, str | None], str | None] = (("", None), None)
        self._last_kept = ("", 0)
        self._zips: list[zipfile.ZipFile] = []
        self._members: dict[str, tuple[int, str]] = {}
        for root in roots:
            if not root.is_dir():
                self._open_zip(root)

    def _open_zip(self, path: Path) -> None:
        try:
            archive = zipfile.ZipFile(path)
        except FileNotFoundError as error:
            raise CloverError(f"no folder or zip file {path} (--images)") from error
        except (zipfile.BadZipFile, IsADirectoryError) as error:
            raise CloverError(
                f"{path} is neither a folder nor a whole zip file: {error}"
            ) from error
        self._zips.append(archive)
        for member in archive.namelist():
            place = (len(self._zips) - 1, member)
            self._members.setdefault(member, place)
            self._members.setdefault(member.rsplit("/", 1)[-1], place)

    def find(self, name: str, split: str | None = None) -> str | None:
        """Return an image's path relative to the record file, or None where there is no image.

        Args:
            name: As the record gives it; its last part alone is looked for as well.
            split: A folder of that name is looked into, as PathVQA's images lie.
        """
        # Questions about one image stand together.
        if self._last[0] != (name, split):
            self._last = ((name, split), self._find(name, split))
        return self._last[1]

    def _find(self, name: str, split: str | None) -> str | None:
        plain = name.replace("\\", "/").partition("#")[0]
        last = plain.rsplit("/", 1)[-1]
        if not last:
            return None
        tries = dict.fromkeys((plain, f"{split}/{last}" if split else last, last))
        for folder in self._folders:
            for attempt in tries:
                path = os.path.join(folder, attempt)
                if os.path.isfile(path):
                    # A region of a slide stays named behind its path.
                    return os.path.relpath(path, self._base) + name[len(plain) :]
        for attempt in tries:
            if attempt in self._members:
                return self._unpack(*self._members[attempt])
        return None

    def _unpack(self, archive: int, member: str) -> str | None:
        # Never out of the folder, whatever a zip file calls its members.
        parts = [part for part in PurePosixPath(member).parts if part not in ("..", "/")]
        target = self._kept.joinpath(*parts)
        size = self._zips[archive].getinfo(member).file_size
        if not (target.is_file() and target.stat().st_size == size):
            try:
                data = self._zips[archive].read(member)
            except _BROKEN:
                self.num_broken += 1
                return None
            _write(target, data)
        return os.path.relpath(target, self._base)

    def keep(self, cell: dict[str, Any]) -> str | None:
        """Write a picture that came inside a row, ``{"bytes": ..., "path": ...}``; return its path.

        A picture without a name is called by the hash of its bytes.
        """
        data, name = cell.get("bytes"), cell.get("path")
        if not isinstance(data, bytes) or not data:
            return self.find(name) if isinstance(name, str) else None
        if isinstance(name, str) and PurePosixPath(name).name:
            file = PurePosixPath(name).name
        else:
            ending = next((end for mark, end in _ENDINGS.items() if data.startswith(mark)), ".img")
            file = hashlib.sha256(data).hexdigest()[:16] + ending
        # Questions about one image stand together and repeat it.
        if self._last_kept != (file, len(data)):
            target = self._kept / file
            if not (target.is_file() and target.stat().st_size == len(data)):
                _write(target, data)
            self._last_kept = (file, len(data))
        return f"{self._kept.name}/{file}"

    def close(self) -> None:
        """Close the zip files."""
        for archive in self._zips:
            archive.close()


def _write(target: Path, data: bytes) -> None:
    # Not atomic: a torn file has another size than its source and is written again.
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)


class Tally:
    """Distinct names counted by 8 bytes each: a million images fit in well under 100 MB."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def is_new(self, name: str) -> bool:
        """Return whether a name is here for the first time, and remember it."""
        before = len(self._seen)
        self._seen.add(_eight_bytes(name))
        return len(self._seen) > before

    def __contains__(self, name: str) -> bool:
        return _eight_bytes(name) in self._seen

    def __len__(self) -> int:
        return len(self._seen)


def _eight_bytes(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(errors="replace"), digest_size=8).digest())
