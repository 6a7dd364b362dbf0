"""Whether a TIFF is one field of view or a whole slide, told from its header: no pixel is read."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

TIFF_SUFFIXES = frozenset([".tif", ".tiff"])
MOST_PIXELS = 64_000_000
"""Of one field of view: above what microscopes' cameras take, below what Pillow warns of (89)."""
_WIDTH, _HEIGHT, _TILE_WIDTH, _SUB_DIRECTORIES = 256, 257, 322, 330
_CLASSIC, _BIG = 42, 43
_SHORT, _LONG8 = 3, 16
_MOST_TAGS = 4096
"""Of a page: more is damage."""
_MOST_PAGES = 64
"""Pages looked at; a pyramid's levels come before, and a damaged file may go round for ever."""


class Page(NamedTuple):
    """What a TIFF's directory says of one page."""

    width: int
    height: int
    is_tiled: bool
    has_levels: bool
    """Whether smaller levels hang below it, as OME-TIFF has them."""


def why_whole_slide(path: Path) -> str | None:
    """Return what makes a TIFF a whole slide, or None for a field of view.

    A whole slide is a tiled file with smaller levels, a tiled file that OpenSlide knows as some
    scanner's, or an image of more pixels than any field of view has. A file that cannot be read is
    none: whoever opens it says what is wrong.
    """
    pages = _pages(path)
    if not pages:
        return None
    first = pages[0]
    size = f"{first.width:,} x {first.height:,} px"
    if first.width * first.height > MOST_PIXELS:
        return f"{size}, a field of view has at most {MOST_PIXELS:,} pixels"
    if not first.is_tiled:
        return None
    if first.has_levels or any(page.is_tiled and page.width < first.width for page in pages):
        return f"{size}, tiled and with smaller levels"
    vendor = _vendor(path)
    return f"{size}, from a scanner ({vendor})" if vendor else None


def _pages(path: Path) -> list[Page]:
    """Return the first pages; of a damaged file those before the damage."""
    found: list[Page] = []
    damage = (OSError, ValueError, KeyError, OverflowError, struct.error)
    with suppress(*damage), path.open("rb") as file:
        for tags in islice(_directories(file), _MOST_PAGES):
            found.append(_page(tags))
    return found


def _page(tags: dict[int, int]) -> Page:
    is_tiled = _TILE_WIDTH in tags
    has_levels = is_tiled and _SUB_DIRECTORIES in tags
    return Page(tags[_WIDTH], tags[_HEIGHT], is_tiled=is_tiled, has_levels=has_levels)


def _directories(file: BinaryIO) -> Iterator[dict[int, int]]:
    """Yield each page's tags with their value, or where their values lie.

    Not Pillow's: it would read every tile's place, and leaves out BigTIFF's subdirectories.

    Source: TIFF 6.0, section 2; BigTIFF, which has wider counts and places.
    """
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}[head[:2]]
    (version,) = struct.unpack(order + "H", head[2:4])
    if version not in (_CLASSIC, _BIG):
        return
    is_big = version == _BIG
    count, entry, place = (
        order + form for form in (("Q", "HHQ8s", "Q") if is_big else ("H", "HHL4s", "L"))
    )
    (start,) = struct.unpack(place, head[8:] if is_big else head[4:8])
    while start:
        file.seek(start)
        (num_tags,) = struct.unpack(count, file.read(struct.calcsize(count)))
        if num_tags > _MOST_TAGS:
            raise ValueError(f"{num_tags} tags")
        rows = file.read(num_tags * struct.calcsize(entry))
        yield {
            tag: _value(order, kind, data) for tag, kind, _, data in struct.iter_unpack(entry, rows)
        }
        (start,) = struct.unpack(place, file.read(struct.calcsize(place)))


def _value(order: str, kind: int, data: bytes) -> int:
    """Return an entry's first number; a place where there are several."""
    form = {_SHORT: "H", _LONG8: "Q"}.get(kind, "L")
    value: int = struct.unpack_from(order + form, data)[0]
    return value


def _vendor(path: Path) -> str | None:
    """Return the scanner's maker, where OpenSlide is there to tell."""
    try:
        import openslide
    except ImportError:
        return None
    vendor: str | None = openslide.OpenSlide.detect_format(path)
    return None if vendor == "generic-tiff" else vendor
