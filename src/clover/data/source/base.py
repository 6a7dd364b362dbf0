"""What the readers of all sources share: options, subsets, names of images, yes and no."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clover.core.errors import CloverError, nearest
from clover.data.lines import Line

_ABSENT = ("", "nan", "none", "null", "[]")
_PICTURES = ("jpg", "jpeg", "png", "tif", "tiff", "bmp", "webp")
_IMAGE_COLUMNS = ("image", "img_id", "image_path", "Figure_path")


@dataclass(frozen=True)
class Options:
    """What the command line says about reading."""

    subset: tuple[str, ...] = ()
    """Each `COLUMN` (rows that fill it) or `COLUMN=VALUE`."""
    text_column: str | None = None
    """The column that becomes the caption."""
    truth: Path | None = None
    """Answers in a file of their own, joined by id."""


class Subset:
    """Chooses rows by their columns and counts those left out."""

    def __init__(self, conditions: Iterable[str]) -> None:
        self.num_left_out = 0
        self._conditions = [condition.partition("=") for condition in conditions]

    def chosen(self, lines: Iterable[Line]) -> Iterator[Line]:
        """Yield the lines of the subset; what is no row passes, to be set aside by name later.

        Raises:
            CloverError: the first row lacks a column that is asked for.
        """
        is_first = True
        for line in lines:
            if isinstance(line.row, dict):
                if is_first:
                    for column, _, _ in self._conditions:
                        check_column(line, column, "--subset")
                    is_first = False
                if not all(
                    str(line.row.get(column)).strip() == value if has_value else is_filled(value_of)
                    for column, has_value, value in self._conditions
                    for value_of in (line.row.get(column),)
                ):
                    self.num_left_out += 1
                    continue
            yield line


def check_column(line: Line, column: str, option: str) -> None:
    """Refuse an option that names a column the row has not.

    Raises:
        CloverError: with the nearest column.
    """
    if column not in line.row:
        raise CloverError(
            f"{line.path} has no column '{column}' ({option}){nearest(column, map(str, line.row))}"
        )


def is_filled(value: Any) -> bool:
    """Return whether a cell says something: pandas writes nothing as nan, None or []."""
    if isinstance(value, str):
        return value.strip().lower() not in _ABSENT
    return value is not None and value == value and value != []


def is_yes_or_no(answer: str) -> bool:
    """Return whether an answer is the bare word yes or no, as PathVQA tells closed from open."""
    return answer.strip().lower() in ("yes", "no")


def image_name(row: Mapping[str, Any]) -> str:
    """Return the name of a row's image under any column, or nothing.

    A data set from the hub holds ``{"bytes": ..., "path": ...}`` instead of a name.
    """
    for column in _IMAGE_COLUMNS:
        value = row.get(column)
        if isinstance(value, Mapping):
            value = value.get("path")
        if isinstance(value, str) and value.strip():
            return value.strip()
    return ""


def stem(name: str) -> str:
    """Return a name without folders and without its picture ending."""
    # Strings, not pathlib: this runs for each of a million rows.
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    front, _, ending = last.rpartition(".")
    return front if front and ending.lower() in _PICTURES else last


def clean(value: Any) -> str:
    """Return a text cell without outer blanks; a number as its digits, nothing as nothing."""
    return value.strip() if isinstance(value, str) else "" if value is None else str(value)


class Unique:
    """Makes names that occur twice differ: ``a``, ``a-2``, ``a-3``."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def __call__(self, name: str) -> str:
        """Return the name, or with a number behind it from its second time on."""
        self._seen[name] += 1
        return name if self._seen[name] == 1 else f"{name}-{self._seen[name]}"
