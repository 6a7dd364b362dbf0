"""Rows out of the files people have: CSV, JSON Lines, JSON, Parquet, pickle; one or a folder.

In: a path. Out: `Line`s, one at a time; CSV, JSON Lines and Parquet of any size need no memory.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from clover.core.errors import CloverError
from clover.core.parquet import parquet_rows
from clover.core.record import NAMES
from clover.core.table import table_rows
from clover.core.text_file import json_lines, open_text
from clover.data.unpickle import read_pickle

KINDS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".pkl", ".pickle")
# Of a folder one kind is read, the first found: PathVQA's holds its questions in two kinds.
_IN_FOLDER = ("*.parquet", "*_qa.pkl", "*_vqa.pkl", "*.jsonl", "*.json", "*.csv")
_BINARY = frozenset((".parquet", ".pkl", ".pickle"))
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"}
_SPLITS["test"] = "test"


class Line(NamedTuple):
    """One row of a file."""

    path: Path
    number: int
    row: Any
    split: str | None
    """What the file's name says: train, val, test or nothing."""


def split_name(text: str) -> str | None:
    """Return train, val or test where a name states one as a word of its own."""
    for word in re.split(r"[^a-z]+", text.lower()):
        if word in _SPLITS:
            return _SPLITS[word]
    return None


def files_of(path: Path) -> list[Path]:
    """Return the file itself, or the data files of a folder and its folders.

    Raises:
        CloverError: no such path, or a folder without a data file.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CloverError(f"no file {path}")
    for pattern in _IN_FOLDER:
        if found := sorted(path.rglob(pattern)):
            return found
    raise CloverError(f"{path} holds no data file; known: {', '.join(KINDS)}")


def text_files_of(path: Path) -> list[Path]:
    """Return those of `files_of` that are text.

    Raises:
        CloverError: see `files_of`.
    """
    return [
        file
        for file in files_of(path)
        if not _BINARY.intersection(suffix.lower() for suffix in file.suffixes[-2:])
    ]


def read_lines(path: Path) -> Iterator[Line]:
    """Yield every row of a file or of a folder's files.

    Raises:
        CloverError: no such path, an unknown kind of file, or one that cannot be read.
    """
    for file in files_of(path):
        split = split_name(file.name.split(".")[0])
        for number, row in _rows(file):
            yield Line(file, number, row, split)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else path.suffix.lower()
    try:
        if kind in (".csv", ".tsv"):
            yield from table_rows(path, NAMES)
        elif kind in (".jsonl", ".ndjson"):
            yield from json_lines(path)
        elif kind == ".json":
            yield from _json_list(path)
        elif kind == ".parquet":
            yield from enumerate(parquet_rows(path), start=1)
        elif kind in (".pkl", ".pickle"):
            yield from enumerate(_as_list(path, read_pickle(path)), start=1)
        else:
            raise CloverError(f"{path}: no reader for '{kind}'; known: {', '.join(KINDS)}, .gz")
    except (gzip.BadGzipFile, EOFError) as error:
        raise CloverError(f"{path} is not whole gzip ({error})") from error


def _json_list(path: Path) -> Iterator[tuple[int, Any]]:
    with open_text(path) as handle:
        try:
            value = json.load(handle)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":
                raise CloverError(f"{path} is not JSON: {error}") from error
            value = None  # JSON Lines under another name, as LLaVA-Med's question files are
        except RecursionError as error:
            raise CloverError(f"{path} is not JSON of rows: it is nested too deep") from error
    if value is None:
        yield from json_lines(path)
    else:
        yield from enumerate(_as_list(path, value), start=1)


def _as_list(path: Path, value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    raise CloverError(f"{path} holds a {type(value).__name__}; a list of rows is needed")
