"""Rows of a CSV or TSV table, whatever its separator and encoding, each with its number."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
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


def table_rows(path: Path) -> Iterator[tuple[int, Cells | Misfit]]:
    """Yield every row under the names of the header, counted from 2; what lacks is None.

    Separated by what the file's ending says; where the header has no such sign, by a semicolon,
    tab or comma, whichever it has. A column without a name is pandas' row number, and left out.
    Empty cells beyond the header are a spreadsheet's; full ones are most often a text that was cut
    at its commas, and the row is a `Misfit`.

    Raises:
        CloverError: the file is no table.
    """
    csv.field_size_limit(1 << 30)
    own = "\t" if ".tsv" in [suffix.lower() for suffix in path.suffixes[-2:]] else ","
    with open_text(path, newline="") as handle:
        first = next((line for line in handle if line.strip()), "")
        try:
            separator = _separator(first, own)
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


def _separator(header: str, own: str) -> str:
    """Return the file's own separator, or the one that cuts its header where that does not."""

    def count(separator: str) -> int:
        return len(next(csv.reader([header], delimiter=separator), []))

    return own if count(own) > 1 else max((own, *_SEPARATORS), key=count)
