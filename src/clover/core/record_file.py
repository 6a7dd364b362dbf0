"""Records in any number: kept as the places where their lines begin, parsed when asked for.

In: a file of JSON Lines or Parquet, or a folder of such files. Out: a `RecordFile`, which is a
sequence of `Record`s at 12 bytes each, and what was set aside. Parquet, whose rows have no place of
their own, is written as JSON Lines once. CSV and JSON lists are read whole, as
`record.read_records` does. Who looks at every record once takes `stream_records`, which keeps none
and writes nothing.
"""

from __future__ import annotations

import array
import bisect
import itertools
import json
import shlex
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import numpy.typing as npt

from clover.core.errors import CloverError
from clover.core.files import fingerprint, sha256_file, write_jsonl
from clover.core.parquet import parquet_rows
from clover.core.record import (
    NAMES,
    SYNONYMS,
    Needs,
    Record,
    Rejection,
    check_columns,
    holds_other_case,
    is_unusable_closed,
    no_usable_record,
    numbered_records,
    read_records,
    read_row,
)
from clover.core.text_file import WINDOWS, encoding_of

Integers = npt.NDArray[np.int64]

_LINES = (".jsonl", ".ndjson")
_PARQUET = ".parquet"
RECORD_SUFFIXES = (*_LINES, _PARQUET)
"""What a folder's files of records are told by."""
_OWN = ("recipe.yaml", "config.json")
"""What a run folder or a model folder holds: what lies in one is no record of the data's."""
_MARK = b"\xef\xbb\xbf"
_CHUNK = 16384
"""Records that are looked up together."""
_PIECE = 4096
"""Bytes read at a time: most lines are shorter."""
_READ = 1 << 18
"""Bytes read at a time where a file is read from front to back."""
_FILES = 64
"""Files of a folder that are open at a time; a process may have a thousand."""
_decode = json.JSONDecoder().scan_once  # type: ignore[attr-defined]
_ODD = (b"\\ud", b"\\uD", b"\\u0000")
"""Escapes of half signs, which are no text, and of NUL, which no file's name holds."""
_PLAIN = frozenset((str, type(None)))

Visit = Callable[[Sequence[str | None]], None]
"""Is given the image names of the next records."""


@dataclass(frozen=True)
class Source:
    """What a person calls a file of records: where it lies, and what names its rows."""

    path: Path
    name: str

    @classmethod
    def of(cls, file: Path, top: Path) -> Source:
        """Return it for a file of the folder `top`: its way from there, so that names differ."""
        if file == top:
            return cls(file, file.stem)
        return cls(file, file.relative_to(top).with_suffix("").as_posix())


class RecordFile(Sequence[Record]):
    """The good records of a file or folder, in order.

    The files must not change while they are read; a record that has become another raises.

    Args:
        files: JSON Lines.
        starts: First byte of each record's line, counted through all files.
        lines: Its number within its file.
        needs: What each filled when the places were found.
        sources: What a person calls each file.
    """

    def __init__(
        self,
        files: Sequence[Path],
        starts: Integers,
        lines: npt.NDArray[np.uint32],
        needs: Needs,
        sources: Sequence[Source],
    ) -> None:
        self._files, self._sources = list(files), list(sources)
        self._starts, self._lines, self._needs = starts, lines, needs
        self._ends = np.cumsum([path.stat().st_size for path in files]).tolist()
        self._open: dict[int, BinaryIO] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of records."""
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        """Parse one record, or some.

        Raises:
            CloverError: the file is another one than it was.
        """
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        start = int(self._starts[index])
        number = bisect.bisect_right(self._ends, start)
        at = start - (self._ends[number - 1] if number else 0)
        return self._record(number, index, _parsed(self._read(number, at)))

    def _record(self, number: int, index: int, row: Any) -> Record:
        """Return the record of an index, whose row stands in a file."""
        source, line = self._sources[number], int(self._lines[index])
        item = read_row(source.path, line, row, self._needs, name=source.name)
        if isinstance(item, Rejection):
            raise CloverError(
                f"{source.path} changed while it was read: line {line} is {item.reason} now"
            )
        return item

    def __iter__(self) -> Iterator[Record]:
        """Parse all records in order, one at a time."""
        return (self[index] for index in range(len(self)))

    def columns(self, *names: str) -> Iterator[tuple[Any, ...]]:
        """Yield some fields of every record in order, as the records have them.

        The files are read from front to back and no record is made: a fifth of the time.
        """
        synonyms = [name for name in names if name in SYNONYMS]
        firsts = np.searchsorted(self._starts, [0, *self._ends])
        for number, (first, last) in enumerate(itertools.pairwise(firsts.tolist())):
            base = self._ends[number - 1] if number else 0
            with self._files[number].open("rb", buffering=_READ) as handle:
                at = 0
                starts = (self._starts[first:last] - base).tolist()
                for index, start in enumerate(starts, start=first):
                    if start != at:
                        handle.seek(start)
                    line = handle.readline()
                    at = start + len(line)
                    row = _parsed(line)
                    is_plain = _is_plain(row, self._needs) and b"\\ud" not in line
                    if is_plain and all(row.get(name) for name in synonyms):
                        # An empty text is none, as `read_row` has it.
                        yield tuple([None if (v := row.get(n)) == "" else v for n in names])
                    else:
                        record = self._record(number, index, row)
                        yield tuple([getattr(record, name, None) for name in names])

    def select(self, chosen: npt.NDArray[np.bool_]) -> RecordFile:
        """Return those of the records that are chosen [N]."""
        starts, lines = self._starts[chosen], self._lines[chosen]
        return RecordFile(self._files, starts, lines, self._needs, self._sources)

    def _read(self, number: int, at: int) -> bytes:
        """Return the line of a file that begins at a byte.

        Read, not mapped: a file that somebody cuts off meanwhile would end the process.
        """
        text = b""
        with self._lock:  # threads share the files
            handle = self._handle(number)
            while True:
                handle.seek(at + len(text))
                piece = handle.read(_PIECE)
                end = piece.find(b"\n")
                if end >= 0 or not piece:
                    return text + piece[: max(end, 0)]
                text += piece

    def _handle(self, number: int) -> BinaryIO:
        if number not in self._open:
            if len(self._open) == _FILES:
                self._open.pop(next(iter(self._open))).close()
            self._open[number] = self._files[number].open("rb", buffering=0)
        return self._open[number]


def columns(records: Sequence[Record], *names: str) -> Iterator[tuple[Any, ...]]:
    """Yield some fields of every record in order; of a `RecordFile` without making one."""
    if isinstance(records, RecordFile):
        return records.columns(*names)
    return (tuple([getattr(record, name, None) for name in names]) for record in records)


def select(records: Sequence[Record], chosen: npt.NDArray[np.bool_]) -> Sequence[Record]:
    """Return those of the records that are chosen [N]; of a `RecordFile` without parsing one."""
    if isinstance(records, RecordFile):
        return records.select(chosen)
    return [record for record, is_chosen in zip(records, chosen, strict=True) if is_chosen]


def open_records(
    path: str | Path,
    *,
    needs: Needs = "any",
    visit: Visit | None = None,
    unpacked: Path | None = None,
) -> tuple[Sequence[Record], list[Rejection]]:
    """Find the good records of a file, or of a folder of JSON Lines or Parquet files.

    Args:
        path: `.jsonl`, `.parquet`, or a folder of one of them; `.json`, `.csv` and `.tsv` are read
            into memory.
        needs: Which columns each record must fill.
        unpacked: The folder for Parquet files as JSON Lines; without one Parquet is refused.
        visit: Is given the image names of all good records in order, some thousands at a time.

    Returns:
        The records, and every line that was set aside with its reason.

    Raises:
        CloverError: no such file, no such column, or not one good record.
    """
    path = Path(path)
    files = files_of_records(path)
    sources = [Source.of(file, path) for file in files]
    kind = files[0].suffix.lower()
    if not path.exists() or kind not in RECORD_SUFFIXES:
        found = read_records(path, needs=needs)
        if visit is not None:
            visit([record.image for record in found.records])
        return found.records, found.rejected
    scan = _Scan(needs, visit)
    lines = []
    for file, source in zip(files, sources, strict=True):
        lines.append(_as_lines(file, unpacked) if kind == _PARQUET else file)
        scan.read(lines[-1], source=source)
    scan.finish(path)
    return RecordFile(lines, scan.starts(), scan.lines(), needs, sources), scan.rejected


def sha256_records(path: str | Path) -> str:
    """Return a hash of a file of records, or of a folder's: of nothing else that lies there.

    Raises:
        CloverError: no such file, or a folder without records.
    """
    path = Path(path)
    if not path.is_dir():
        return sha256_file(path)
    return fingerprint(
        [(str(file.relative_to(path)), sha256_file(file)) for file in files_of_records(path)]
    )


def stream_records(path: str | Path) -> Iterator[tuple[Path, int, Record | Rejection]]:
    """Yield every record and what is set aside, with file and line: all forms `open_records` takes.

    Nothing is kept, and Parquet is not written as JSON Lines. Ids that repeat are not looked for.

    Raises:
        CloverError: no such file, Parquet that holds images, or, at the end, not one good record.
    """
    path = Path(path)
    files = files_of_records(path)
    if not path.exists() or files[0].suffix.lower() not in RECORD_SUFFIXES:
        for line, item in numbered_records(path, "any"):
            yield path, line, item
        return
    reasons: Counter[str] = Counter()
    has_good = False
    for file in files:
        source = Source.of(file, path)
        for line, row in _numbered_rows(file):
            item = read_row(file, line, row, "any", name=source.name)
            if isinstance(item, Rejection):
                reasons[item.reason] += 1
            else:
                has_good = True
            yield file, line, item
    if not has_good:
        raise no_usable_record(path, reasons)


def _numbered_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield the rows of JSON Lines or Parquet as `open_records` sees them, each with its line."""
    if file.suffix.lower() == _PARQUET:
        for number, row in enumerate(parquet_rows(file), start=1):
            try:
                json.dumps(row)  # `open_records` writes it so
            except TypeError as error:
                raise _more_than_json(file, error) from error
            yield number, row
        return
    with file.open("rb") as handle:
        _check_encoding(file, handle.peek(4)[:4])
        for number, line in enumerate(handle, start=1):
            if line.removeprefix(_MARK).strip():
                yield number, _parsed(line)


def _check_encoding(path: Path, start: bytes) -> None:
    """Refuse an encoding in which a line does not end at the byte of its end."""
    if encoding := encoding_of(start):
        raise CloverError(
            f"{path} is {encoding.upper()}; save it as UTF-8: "
            f"clover data import records {shlex.quote(str(path))} --out F.jsonl"
        )


def _more_than_json(path: Path, error: TypeError) -> CloverError:
    return CloverError(
        f"{path} holds more than text and numbers ({error}); write its images out first: "
        f"clover data import records {shlex.quote(str(path))} --out F"
    )


def files_of_records(path: Path) -> list[Path]:
    """Return the file itself, or a folder's files of one kind; run and model folders apart.

    Raises:
        CloverError: a folder of both kinds, or of neither.
    """
    if not path.is_dir():
        return [path]
    lines, parquet = (
        sorted(
            file
            for kind in kinds
            for file in path.rglob(f"*{kind}")
            if not any((folder / mark).exists() for folder in _between(file, path) for mark in _OWN)
        )
        for kinds in (_LINES, (_PARQUET,))
    )
    if lines and parquet:
        raise CloverError(
            f"{path} holds both JSON Lines and Parquet ({lines[0].name}, {parquet[0].name}); "
            "put the records into a folder of their own"
        )
    if lines or parquet:
        return lines or parquet
    raise CloverError(f"{path} holds no file of records ({', '.join(RECORD_SUFFIXES)})")


def _between(file: Path, top: Path) -> list[Path]:
    """Return the folders from a file's own up to the one below `top`."""
    return [folder for folder in file.parents if folder != top and top in folder.parents]


def _as_lines(path: Path, folder: Path | None) -> Path:
    """Return a Parquet file's rows as a file of JSON Lines, which is made once.

    Raises:
        CloverError: not readable, or it holds what JSON cannot: images.
    """
    if folder is None:
        raise CloverError(
            f"{path} is Parquet; write records first: "
            f"clover data import records {shlex.quote(str(path))} --out F"
        )
    found = path.stat()
    key = fingerprint([str(path.absolute()), found.st_size, found.st_mtime_ns])
    made = folder / f"{path.stem}-{key}.jsonl"
    if not made.exists():
        try:
            write_jsonl(made, parquet_rows(path))
        except TypeError as error:
            raise _more_than_json(path, error) from error
    return made


class _Scan:
    """One pass over the lines of some files."""

    def __init__(self, needs: Needs, visit: Visit | None) -> None:
        self.rejected: list[Rejection] = []
        self._needs: Needs = needs
        self._visit = visit
        self._starts = array.array("q")
        self._lines = array.array("I")
        self._columns: dict[str, None] = {}
        self._offset = 0
        self._seen: list[Integers] = []
        """Hashes of ids, sorted, each array at least twice as long as the next."""
        # Of the records since the last look at the ids.
        self._ids: list[str] = []
        self._names: list[str | None] = []
        self._path = Path()

    def starts(self) -> Integers:
        return np.frombuffer(self._starts, np.int64)

    def lines(self) -> npt.NDArray[np.uint32]:
        return np.frombuffer(self._lines, np.uint32)

    def read(self, path: Path, *, source: Source) -> None:
        """Look at every line of one file; `source` is what a person calls it."""
        self._path = source.path
        needs, ids, names = self._needs, self._ids, self._names
        starts, lines = self._starts.append, self._lines.append
        offset = self._offset
        with path.open("rb") as handle:
            _check_encoding(path, handle.peek(4)[:4])
            for number, line in enumerate(handle, start=1):
                start = offset
                offset += len(line)
                if not line.removeprefix(_MARK).strip():
                    continue
                row = _parsed(line)
                is_odd = b"\\u" in line and any(mark in line for mark in _ODD)
                if _is_plain(row, needs) and not is_odd:
                    ids.append(row["id"])
                    names.append(row["image"])
                else:
                    item = self._slowly(source, number, row)
                    if item is None:
                        continue
                    ids.append(item.id)
                    names.append(item.image)
                starts(start)
                lines(number)
                if len(ids) == _CHUNK:
                    self._look()
        self._offset = offset
        self._look()

    def _slowly(self, source: Source, number: int, row: Any) -> Record | None:
        """Read a row that is not in the plain form; None where it is set aside."""
        if isinstance(row, dict):
            self._columns.update(dict.fromkeys(row))
        item = read_row(source.path, number, row, self._needs, name=source.name)
        if isinstance(item, Rejection):
            self.rejected.append(item)
            return None
        return item

    def _look(self) -> None:
        """Set aside ids that were there before; hand the images' names on.

        Ids are compared by 64 bits of their hash: of a million, two are taken for one with a
        probability of 3e-8.
        """
        hashes = np.fromiter(map(hash, self._ids), np.int64, len(self._ids))
        is_first = np.zeros(len(hashes), bool)
        is_first[np.unique(hashes, return_index=True)[1]] = True
        is_new = is_first
        for seen in self._seen:
            is_new &= ~_is_among(hashes, seen)
        if not is_new.all():
            base = len(self._starts) - len(hashes)
            for place in np.flatnonzero(~is_new):
                content = {"id": self._ids[place], "image": self._names[place]}
                line = self._lines[base + int(place)]
                self.rejected.append(Rejection(str(self._path), line, "duplicate id", content))
            for kept in (self._starts, self._lines):
                new = np.asarray(kept[base:])[is_new]
                del kept[base:]
                kept.extend(new.tolist())
        self._seen.append(np.sort(hashes))
        while len(self._seen) > 1 and len(self._seen[-2]) < 2 * len(self._seen[-1]):
            self._seen[-2:] = [np.sort(np.concatenate(self._seen[-2:]), kind="stable")]
        if self._visit is not None:
            self._visit([name for name, new in zip(self._names, is_new, strict=True) if new])
        self._ids.clear()
        self._names.clear()

    def finish(self, path: Path) -> None:
        """Complain where not one record was good."""
        if not self._starts:
            if self._columns or not self.rejected:
                check_columns(path, list(self._columns), self._needs)
            raise no_usable_record(path, Counter(item.reason for item in self.rejected))


def _is_among(values: Integers, known: Integers) -> npt.NDArray[np.bool_]:
    """Return which values [N] are among known ones [M], which are sorted."""
    if not len(known):
        return np.zeros(len(values), bool)
    found: npt.NDArray[np.bool_] = (
        known[np.searchsorted(known, values).clip(max=len(known) - 1)] == values
    )
    return found


def _parsed(line: bytes) -> Any:
    """Return a line's row, or its own text where it is not JSON."""
    try:
        text = line.removeprefix(_MARK).decode("utf-8", WINDOWS).strip()
        row, end = _decode(text, 0)
        return row if end == len(text) else text[:200]
    except (ValueError, RecursionError, StopIteration):
        return line.decode("utf-8", WINDOWS)[:200]


def _is_plain(row: Any, needs: Needs) -> bool:
    """Return whether a row is a good record beyond doubt, in our own columns.

    A quarter of the time of `read_row`, which decides on all others.
    """
    if type(row) is not dict or not row.get("id") or not row.get("image"):
        return False
    if not _PLAIN.issuperset(map(type, row.values())):
        for name, value in row.items():
            if name in NAMES and type(value) is not str and value is not None:
                return False
    if row.get("answer_type") not in (None, "open", "closed"):
        return False
    if not "".join(row).islower() and holds_other_case(row):
        return False
    return _fills(row, needs)


def _fills(row: Mapping[str, Any], needs: Needs) -> bool:
    if needs == "caption":
        return bool((row.get("caption") or "").strip())
    if needs == "question":
        answer = (row.get("answer") or "").strip()
        if not answer or not (row.get("question") or "").strip():
            return False
        return row.get("answer_type") != "closed" or not is_unusable_closed(answer)
    return True
