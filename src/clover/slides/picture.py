"""Any image a record, a command or a page may name: a file, or a region of a slide.

``slide.svs#x,y,width_um,height_um`` is readable wherever an image's path is.
"""

from __future__ import annotations

import hashlib
import io
from functools import cache, lru_cache
from pathlib import Path
from threading import RLock

from PIL import Image

from clover.core.decoding import UnreadableImage, decoding
from clover.core.errors import CloverError
from clover.core.files import sha256_file
from clover.core.transparency import on_white
from clover.slides.reader import Slide, open_slide
from clover.slides.region import Region, split_reference
from clover.slides.source import SLIDE_SUFFIXES
from clover.slides.tiff import TIFF_SUFFIXES, why_whole_slide

_OVERVIEW = 512
"""Longer side in pixels of a region that is only looked over: for colours, for a thumbnail."""

_OPENING = RLock()
"""Of threads that want a slide opened or hashed, one does it and all have it: gigabytes each."""


@lru_cache(maxsize=8)
def _shared_slide(path: Path, _changed: int) -> Slide:
    """Open a slide once: the regions of one slide stand together in a file."""
    return open_slide(path)


def shared_slide(path: Path) -> Slide:
    """Return a slide that stays open, opened again when its file has changed.

    Raises:
        CloverError: no such file, or no slide.
    """
    try:
        with _OPENING:
            return _shared_slide(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise CloverError(f"no slide {path}") from error


def is_region(name: str | Path) -> bool:
    """Return whether a name stands for a region of a slide.

    Raises:
        CloverError: there is a # whose rest is no region.
    """
    return split_reference(name)[1] is not None


def read_region(name: str | Path, microns_per_pixel: float | None) -> Image.Image:
    """Read ``slide.svs#x,y,width_um,height_um``.

    Args:
        name: The reference.
        microns_per_pixel: Of the picture: the encoder's. None gives a picture of at most 512 px
            for whoever only looks it over.

    Raises:
        CloverError: no slide, no µm per pixel in it, a region outside, or damage.
    """
    path, region = split_reference(name)
    assert region is not None, "a plain image is no region"
    slide = shared_slide(path)
    return slide.read(region, microns_per_pixel or _looked_over(region, slide))


def _looked_over(region: Region, slide: Slide) -> float:
    return max(max(region.width, region.height) / _OVERVIEW, slide.scale.mean)


def open_picture(image: str | Path | bytes, microns_per_pixel: float | None = None) -> Image.Image:
    """Open an image by its name, which may stand for a region of a slide, or from its bytes.

    Args:
        image: What to open.
        microns_per_pixel: Of a region's picture; None only looks a region over.

    Raises:
        CloverError: no such file, not an image, or a region that cannot be read.
    """
    if not isinstance(image, bytes) and is_region(image):
        return read_region(image, microns_per_pixel)
    name = "the image" if isinstance(image, bytes) else str(image)
    try:
        return decoded(io.BytesIO(image) if isinstance(image, bytes) else image)
    except FileNotFoundError as error:
        raise CloverError(f"no image {name}") from error
    except UnreadableImage as error:
        raise CloverError(f"{name} cannot be read as an image: {error}") from error


def decoded(file: str | Path | io.BytesIO) -> Image.Image:
    """Return a plain image file, decoded to its end, on white.

    Raises:
        FileNotFoundError: no such file.
        UnreadableImage: not an image, damage, or pixels that are 32-bit numbers.
    """
    with decoding(), Image.open(file) as opened:
        opened.load()
        return on_white(opened)


def is_whole_slide(path: str | Path) -> bool:
    """Return whether a file is no field of view, but a slide of many.

    A scanner's file is one by its name, a TIFF by its content: many are plain tiles.
    """
    return _why_whole_slide(Path(path)) is not None


def _why_whole_slide(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if suffix in TIFF_SUFFIXES:
        return why_whole_slide(path)
    return f"a scanner's {suffix}" if suffix in SLIDE_SUFFIXES else None


def check_is_no_slide(path: str | Path) -> None:
    """Refuse a whole slide where a field of view is wanted.

    Raises:
        CloverError: the file is a whole slide.
    """
    reason = _why_whole_slide(Path(path))
    if reason is not None:
        raise CloverError(
            f"{path} is a whole slide ({reason}); name a region with --region x,y,width,height "
            "(µm), or go over all of its tissue with --tour"
        )


@cache  # a slide is gigabytes, its hash 64 characters
def _slide_digest(path: Path, _changed: int) -> str:
    return sha256_file(path)


def slide_digest(path: Path) -> str:
    """Return the SHA-256 of a slide's bytes, read once a process while it does not change.

    Raises:
        OSError: no such slide.
    """
    with _OPENING:
        return _slide_digest(path, path.stat().st_mtime_ns)


def region_digest(name: str | Path, microns_per_pixel: float | None) -> str:
    """Return the cache key of a region: the slide's bytes, the place, and the resolution.

    Another slide, place or resolution is a miss, never a wrong hit.

    Raises:
        OSError: no such slide.
    """
    path, region = split_reference(name)
    slide = slide_digest(path)
    return hashlib.sha256(f"{slide}#{region}@{microns_per_pixel}".encode()).hexdigest()
