"""Text files in the encoding they were saved in: UTF-8, UTF-16 or UTF-32, else Windows-1252."""

from __future__ import annotations

import codecs
import gzip
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

WINDOWS = "clover-windows-1252"
"""The `errors` of a decoder of UTF-8 that reads as Windows-1252 the bytes that are no UTF-8.

By the byte, not by the file: where two encodings were pasted together, both are read right.
"""


def _as_windows(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return error.object[error.start : error.end].decode("cp1252", "replace"), error.end


codecs.register_error(WINDOWS, _as_windows)


def encoding_of(start: bytes) -> str | None:
    """Return the encoding that a file's first four bytes betray; None is UTF-8 or Windows-1252."""
    if start in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        return "utf-32"
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    # JSON and tables begin with an ASCII mark: where its zero byte stands tells the order.
    if len(start) == 4 and start[1:2] == b"\0" == start[3:4] and start[:1] != b"\0":
        return "utf-16-le"
    if len(start) == 4 and start[:1] == b"\0" == start[2:3] and start[1:2] != b"\0":
        return "utf-16-be"
    return None


def open_text(path: Path, *, newline: str | None = None) -> IO[str]:
    """Open a text file to read, one in gzip by its ending; no byte of it is an error.

    Args:
        path: The file. It may be a pipe: it is opened once.
        newline: As for `open`.
    """
    raw = _open(path)
    try:
        encoding = encoding_of(raw.peek(4)[:4])
        errors = "replace" if encoding else WINDOWS
        return io.TextIOWrapper(raw, encoding or "utf-8-sig", errors, newline)
    except BaseException:
        raw.close()
        raise


def _open(path: Path) -> io.BufferedReader | gzip.GzipFile:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield each line's number, from 1, and its value; the start of a line that is no JSON."""
    with open_text(path) as handle:
        for number, text in enumerate(handle, start=1):
            if text.strip():
                try:
                    yield number, json.loads(text)
                except (ValueError, RecursionError):
                    yield number, text[:200]


def windows_lines(files: Iterable[Path]) -> list[str]:
    """Return a sentence on the lines that are no UTF-8, or nothing: a look at every byte.

    Who reads on in a guessed encoding should say so.
    """
    count, first = 0, ""
    for path in filter(Path.is_file, files):  # a pipe is read by now
        with _open(path) as handle:
            if encoding_of(handle.peek(4)[:4]):
                continue
            for number, line in enumerate(handle, start=1):
                try:
                    line.decode()
                except UnicodeDecodeError:
                    count += 1
                    first = first or f"{path.name} line {number:,}"
    if not count:
        return []
    return [
        f"{count:,} lines are not UTF-8 and were read as Windows-1252 (first: {first}); save as "
        "UTF-8 what is in another encoding"
    ]
