"""What images are called when records go to another folder: `image` starts from the file's own.

In: the records of one file, and the file they go to. Out: how images are named from there.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from clover.core.record import Record

Move = Callable[[Record], Record]
_MOST_NAMES = 4096
"""Names looked for; where so many lie elsewhere, a million more need not be asked for."""


def image_move(records: Iterable[Record], *, source: Path, out: Path) -> Move | None:
    """Return what names a record's image from the folder of `out` instead of that of `source`.

    Absolute names stay. A group that is the image's own name, or that of its slide, follows it:
    else two files about one image would be two groups.

    Args:
        records: Of `source`; read until the first whose image lies where its name says, or until
            4,096 images were looked for.
        source: The file they stand in.
        out: The file they go to.

    Returns:
        The function; in the same folder it changes nothing. None where none of these images lies as
        seen from the folder of `source`: the names start from a folder that only the user knows
        (--images).
    """
    if os.path.realpath(source.parent) == os.path.realpath(out.parent):
        return lambda record: record
    folder = str(source.parent)
    if not any(_lies_in(folder, name) for name in itertools.islice(_names(records), _MOST_NAMES)):
        return None
    folder, start = _ends(folder, str(out.parent))

    def renamed(name: str) -> str:
        return os.path.relpath(os.path.join(folder, name), start)

    def move(record: Record) -> Record:
        image, group = record.image, record.group
        if not image or os.path.isabs(image):
            return record
        changed = {"image": renamed(image)}
        if group and (image == group or image.startswith(f"{group}#")):
            changed["group"] = renamed(group)
        return record.model_copy(update=changed)

    return move


def _names(records: Iterable[Record]) -> Iterator[str]:
    """Yield the relative names of images, each once."""
    seen: set[str] = set()
    for record in records:
        image = record.image
        if image and image not in seen and not os.path.isabs(image):
            seen.add(image)
            yield image


def _lies_in(folder: str, image: str) -> bool:
    """Return whether a relative name leads to a file; behind its last # may stand a region."""
    slide = image.rpartition("#")[0]
    return any(os.path.isfile(os.path.join(folder, name)) for name in (image, slide) if name)


def _ends(folder: str, start: str) -> tuple[str, str]:
    """Return two folders as names that lead from the second to the first.

    As they are given, where that leads there: `..` leaves the folder behind a symbolic link, not
    the one that the link lies in.
    """
    real = os.path.realpath(folder)
    if os.path.realpath(os.path.join(start, os.path.relpath(folder, start))) == real:
        return folder, start
    return real, os.path.realpath(start)
