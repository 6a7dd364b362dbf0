"""Rows of a CSV or TSV table, whatever its separator and encoding, each with its number."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from clover.core.errors import CloverError
from clover.core.text_file import open_text

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
Cells = dict[str, str | None]


@dataclass(frozen=True)
class Misfit:
    """A row that does not fit its header, to be set aside for a reason."""

    reason: str
    cells: list[str]


def table_rows(path: Path, known: Collection[str]) -> Iterator[tuple[int, Cells | Misfit]]:
    """Yield every row under the names of the header, counted from 2; what lacks is None.

    Separated by that of comma, semicolon and tab which sets most known names of the header free;
    of equals by what the file's ending says, or, where the header has none of it, by whichever it
    has. A column without a name is pandas' row number, and left out. Empty cells beyond the header
    are a spreadsheet's; full ones are most often a text that was cut at its commas, and the row is
    a `Misfit`.

    Args:
        path: The file.
        known: Names of columns in small letters; they tell a separator from a sign in a name.

    Raises:
        CloverError: the file is no table.
    """
    csv.field_size_limit(1 << 30)
    own = "\t" if ".tsv" in [suffix.lower() for suffix in path.suffixes[-2:]] else ","
    with open_text(path, newline="") as handle:
        first = next((line for line in handle if line.strip()), "")
        try:
            separator = _separator(first, own, known)
            reason = f"more cells than the header: quote texts that hold {_SEPARATORS[separator]}"
            rows = csv.reader(itertools.chain([first], handle), delimiter=separator)
            header = [name.strip() for name in next(rows, [])]
            for number, cells in enumerate(filter(None, rows), start=2):
                if any(cell.strip() for cell in cells[len(header) :]):
                    yield number, Misfit(reason, cells)
                    continue
                row: Cells = dict(itertools.zip_longest(header, cells[: len(header)]))
                row.pop("", None)
                yield number, row
        except csv.Error as error:
            raise CloverError(f"{path} is not CSV ({error})") from error


def _separator(header: str, own: str, known: Collection[str]) -> str:
    """Return what sets most known names free; else the file's own, or what cuts its header."""

    def fit(separator: str) -> tuple[int, bool, int]:
        names = next(csv.reader([header], delimiter=separator), [])
        num_known = sum(name.strip().lower() in known for name in names)
        return num_known, separator == own and len(names) > 1, len(names)

    return max((own, *_SEPARATORS), key=fit)
