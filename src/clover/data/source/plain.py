"""Anybody's table of captions or questions: the usual column names are known, the rest is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from clover.data.lines import Line
from clover.data.source.base import Options, check_column


def read(lines: Iterator[Line], options: Options) -> Iterator[Line]:
    """Yield each line with empty cells left out and the chosen text as its caption.

    Raises:
        CloverError: no such text column.
    """
    is_first = True
    for line in lines:
        if not isinstance(line.row, dict):
            yield line
            continue
        row = {key: value for key, value in line.row.items() if not _is_empty(value)}
        if options.text_column is not None:
            if is_first:
                check_column(line, options.text_column, "--text-column")
                is_first = False
            row["caption"] = row.pop(options.text_column, "")
        if line.split is not None:
            row.setdefault("split", line.split)
        yield line._replace(row=row)


def _is_empty(value: Any) -> bool:
    # Not `is_filled`: "None" is an answer here, and only in a pandas table nothing.
    return value is None or value in ("", []) or value != value
