"""Where the images are: folders and zip files, looked through by the names that records give.

A record's image becomes a path relative to the written file's folder. What lies in a zip, or inside
a Parquet row, is written to `F-images/` beside the file, once. A name that fits several pictures is
given none: a record with another's picture is worse than none.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from clover.core.errors import CloverError
from clover.core.files import atomic_path
from clover.core.tally import Tally

_ENDINGS = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"II*\x00": ".tif", b"MM\x00*": ".tif"}
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


class Ambiguous(NamedTuple):
    """Several pictures that a record's name fits equally well, or one that it fits by half."""

    places: tuple[str, ...]


class _Place(NamedTuple):
    """A picture: a file, or a member of the zip file with a number."""

    archive: int | None
    name: str


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
        # The whole stem: p.train.jsonl and p.val.jsonl have a folder each.
        self._kept = self._base / f"{out.stem}-images"
        self._folders = list(dict.fromkeys(str(r.absolute()) for r in roots if r.is_dir()))
        self._last: tuple[tuple[str, str | None], str | Ambiguous | None] = (("", None), None)
        self._last_kept: tuple[str, bytes, str] = ("", b"", "")
        self._zips: list[zipfile.ZipFile] = []
        self._members: dict[str, _Place] = {}
        self._by_last: dict[str, list[_Place]] = {}
        # Pictures by all of a name, by a part of one, and by which; those that two names claim.
        self._named, self._guessed, self._guesses = Tally(), Tally(), Tally()
        self._contested: set[str] = set()
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
        for member in dict.fromkeys(archive.namelist()):
            place = _Place(len(self._zips) - 1, member)
            self._members.setdefault(member, place)
            self._by_last.setdefault(member.rsplit("/", 1)[-1], []).append(place)

    @property
    def num_contested(self) -> int:
        """How many pictures two names have claimed: the first to come may have the other's."""
        return len(self._contested)

    def find(self, name: str, split: str | None = None) -> str | Ambiguous | None:
        """Return an image's path relative to the record file, or None where there is no image.

        The name as it stands is looked for in all roots, then what ends with all of it, then with
        ever less of it; its last part alone comes last. Of several different pictures that fit
        alike none is taken. Neither is one, by a part of the name, that another name has claimed.

        Args:
            name: As the record gives it.
            split: A folder of that name is looked into, as PathVQA's images lie.
        """
        # Questions about one image stand together.
        if self._last[0] != (name, split):
            self._last = ((name, split), self._find(name, split))
        return self._last[1]

    def _find(self, name: str, split: str | None) -> str | Ambiguous | None:
        plain = name.replace("\\", "/").partition("#")[0]
        *folders, last = plain.split("/")
        if not last:
            return None
        by_split = [f"{split}/{last}"] if split else []
        for attempt in (plain, *by_split):
            if place := self._exact(attempt):
                return self._taken(place, plain, name)
        parts = [part for part in (*folders, last) if part]
        suffixes = ["/".join(parts[first:]) for first in range(len(parts))]
        for attempt in (*suffixes[:-1], *by_split, last):
            if found := self._distinct(self._ending_with(attempt)):
                if len(found) > 1:
                    return Ambiguous(tuple(self._told(place) for place in found))
                return self._taken(found[0], plain, name)
        return None

    def _exact(self, attempt: str) -> _Place | None:
        for folder in self._folders:
            if os.path.isfile(path := os.path.join(folder, attempt)):
                return _Place(None, path)
        return self._members.get(attempt)

    def _ending_with(self, attempt: str) -> Iterator[_Place]:
        for folder in self._folders:
            if os.path.isfile(path := os.path.join(folder, attempt)):
                yield _Place(None, path)
        for place in self._by_last.get(attempt.rsplit("/", 1)[-1], ()):
            if f"/{place.name}".endswith(f"/{attempt}"):
                yield place

    def _distinct(self, places: Iterator[_Place]) -> list[_Place]:
        """Return those that are not another's copy."""
        found = list(places)
        if len(found) < 2:
            return found
        return list({self._checksum(place): place for place in reversed(found)}.values())[::-1]

    def _checksum(self, place: _Place) -> tuple[int, int]:
        if place.archive is None:
            return _checksum(Path(place.name))
        info = self._zips[place.archive].getinfo(place.name)
        return info.CRC, info.file_size

    def _told(self, place: _Place) -> str:
        if place.archive is None:
            return os.path.relpath(place.name, self._base)
        return f"{self._zips[place.archive].filename}: {place.name}"

    def _taken(self, place: _Place, plain: str, name: str) -> str | Ambiguous | None:
        """Return the path of a picture, unless only a part of the name says so and another's too.

        Of slide_1/7.png and slide_2/7.png one may have lost its picture: the other's is not its.
        """
        key = f"{place.archive}:{place.name}"
        is_guess = (
            "/" in plain
            and not f"/{place.name}".endswith(f"/{plain.lstrip('/')}")
            and not self._ends_with_all(plain, place)
        )
        if is_guess:
            is_other = self._guesses.is_new(f"{key}\n{plain}") and not self._guessed.is_new(key)
            is_claimed = is_other or key in self._named
        else:
            self._named.is_new(key)
            is_claimed = key in self._guessed
        if is_claimed:
            self._contested.add(key)
        if is_guess and key in self._contested:
            return Ambiguous((self._told(place),))
        if place.archive is None:
            # A region of a slide stays named behind its path.
            return os.path.relpath(place.name, self._base) + name[len(plain) :]
        return self._unpack(place.archive, place.name)

    def _ends_with_all(self, plain: str, place: _Place) -> bool:
        """Return whether a name is a picture's whole path below its root, behind other folders.

        So other machines call it. A path without a folder is too little: any slide has a 7.png.
        """
        if place.archive is None:
            tops = [f"{folder.rstrip('/')}/" for folder in self._folders]
            below = [place.name[len(top) :] for top in tops if place.name.startswith(top)]
        else:
            below = [place.name]
        return any("/" in path and f"/{plain}".endswith(f"/{path}") for path in below)

    def _unpack(self, archive: int, member: str) -> str | None:
        # Never out of the folder, whatever a zip file calls its members.
        parts = [part for part in PurePosixPath(member).parts if part not in ("..", "/")]
        target = self._kept.joinpath(*parts)
        if not (target.is_file() and _checksum(target) == self._checksum(_Place(archive, member))):
            try:
                data = self._zips[archive].read(member)
            except _BROKEN:
                self.num_broken += 1
                return None
            target = _stored(target, data)
        return os.path.relpath(target, self._base)

    def keep(self, cell: dict[str, Any]) -> str | Ambiguous | None:
        """Write a picture that came inside a row, ``{"bytes": ..., "path": ...}``; return its path.

        A picture without a name is called by the hash of its bytes; one whose name another picture
        has, by its name and the hash.
        """
        data, name = cell.get("bytes"), cell.get("path")
        if not isinstance(data, bytes) or not data:
            return self.find(name) if isinstance(name, str) else None
        file = (
            name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] if isinstance(name, str) else ""
        )
        if file in ("", ".", ".."):
            ending = next((end for mark, end in _ENDINGS.items() if data.startswith(mark)), ".img")
            file = _hash(data) + ending
        # Questions about one image stand together and repeat it.
        if self._last_kept[:2] != (file, data):
            self._last_kept = (file, data, _stored(self._kept / file, data).name)
        return f"{self._kept.name}/{self._last_kept[2]}"

    def close(self) -> None:
        """Close the zip files."""
        for archive in self._zips:
            archive.close()


def _stored(target: Path, data: bytes) -> Path:
    """Write a picture under its name, or with its hash behind it where another has the name.

    Nothing is written over: the records of an earlier import may show what lies there.
    """
    if target.exists():
        if target.is_file() and target.read_bytes() == data:
            return target
        target = target.with_name(f"{target.stem}-{_hash(data)}{target.suffix}")
        if target.is_file() and target.read_bytes() == data:
            return target
    with atomic_path(target) as partial:
        partial.write_bytes(data)
    return target


def _checksum(path: Path) -> tuple[int, int]:
    """Return a file's CRC-32 and size, as zip files hold them."""
    data = path.read_bytes()
    return zlib.crc32(data), len(data)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
