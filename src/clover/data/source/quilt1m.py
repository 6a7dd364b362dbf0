"""Quilt-1M's lookup table: a caption a row, an image in several rows, further columns kept.

The published model trains on the rows with a pathology: ``--subset pathology``. Images cut from one
film are one group, or a film would stand on both sides of a split.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from clover.data.lines import Line, split_name
from clover.data.source.base import Options, check_column, clean, is_filled

# The film's eleven signs stand before what was cut from it.
_FILM = re.compile(r"^([\w-]{11})_(?:roi|image)_")
_OURS = ("caption", "image_path", "split")


def read(lines: Iterator[Line], options: Options) -> Iterator[Line]:
    """Yield one line a caption, in our columns and its own.

    Raises:
        CloverError: no such text column.
    """
    column = options.text_column or "caption"
    is_first = True
    for line in lines:
        if not isinstance(line.row, dict):
            yield line
            continue
        if is_first:
            check_column(line, column, "--text-column")
            check_column(line, "image_path", "quilt1m")
            is_first = False
        row: dict[str, Any] = {
            key: value
            for key, value in line.row.items()
            if key not in _OURS and key != column and is_filled(value)
        }
        image = clean(line.row.get("image_path"))
        row |= {"caption": clean(line.row.get(column)), "image": image, "source": "quilt1m"}
        row["split"] = split_name(clean(line.row.get("split")))
        row["id"] = f"{line.path.name.split('.')[0]}-{line.number}"
        if film := _FILM.match(image.rsplit("/", 1)[-1]):
            row["group"] = film[1]
        yield line._replace(row=row)
