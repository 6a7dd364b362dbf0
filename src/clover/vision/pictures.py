"""The images that records name, each opened once: there, whole, its bytes' hash, its portrait."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from clover.core.decoding import UnreadableImage, decoding
from clover.core.errors import CloverError
from clover.core.transparency import rgb_on_white
from clover.slides.picture import read_region, region_digest, slide_digest
from clover.slides.region import split_reference
from clover.vision.likeness import SIDE, Floats, portrait

GREY = 16
"""Of 255: where nine tenths of a picture have their channels closer together, it has no colour."""
_SEEN = 32
"""Pixels a side that colour is looked for in: noise and JPEG's blocks are averaged away."""
_UNREADABLE = "unreadable region"
_SLIDES = (".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".bif")


@dataclass(frozen=True)
class Picture:
    """What opening one image showed."""

    problem: str | None
    """Missing, empty, broken or 32-bit grey image, unreadable region; or nothing."""
    digest: str = ""
    """SHA-256 of its bytes, in hex; of a region that of the slide's bytes and the place; of a whole
    slide nothing."""
    portrait: Floats | None = None
    """Only where asked for, and not of a whole slide."""
    is_grey: bool = False
    """Whether it has next to no colour; never said of a slide."""
    slide: str = ""
    """Of a region, SHA-256 of the slide's bytes."""


def look(path: Path, *, with_portrait: bool) -> Picture:
    """Open an image.

    Args:
        path: The image, or a region of a slide (`slide.svs#...`): its slide is read through once a
            process, as its features need it, the region itself only for a portrait.
        with_portrait: Also make what look-alikes are told by.
    """
    try:
        slide, region = split_reference(path)
    except CloverError:  # what stands behind the # is no region
        return Picture(_UNREADABLE)
    if region is not None:
        return _look_at_region(path, slide, with_portrait=with_portrait)
    if path.suffix.lower() in _SLIDES:  # gigabytes: not read through
        return Picture(None if path.is_file() else "missing image")
    try:
        data = path.read_bytes()
    except OSError:
        return Picture("missing image")
    if not data:
        return Picture("empty image")
    digest = hashlib.sha256(data).hexdigest()
    try:
        with warnings.catch_warnings(), decoding():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                # A JPEG decodes at a fraction of its size, and is read to its end all the same.
                image.draft("RGB", (2 * _SEEN, 2 * _SEEN))
                is_grey = _is_grey(image)
            if not with_portrait:
                return Picture(None, digest, is_grey=is_grey)
            with Image.open(io.BytesIO(data)) as image:
                image.draft("L", (2 * SIDE, 2 * SIDE))
                return Picture(None, digest, portrait(image), is_grey)
    except UnreadableImage as error:
        return Picture(error.kind, digest)


def _look_at_region(path: Path, slide: Path, *, with_portrait: bool) -> Picture:
    try:
        # Of no resolution: two files' regions are compared, no encoder's reading of them.
        digest, whole = region_digest(path, None), slide_digest(slide)
    except OSError:
        return Picture("missing image")
    if not with_portrait:
        return Picture(None, digest, slide=whole)
    try:
        return Picture(None, digest, portrait(read_region(path, None)), slide=whole)
    except CloverError:
        return Picture(_UNREADABLE, digest, slide=whole)


def _is_grey(image: Image.Image) -> bool:
    """Return whether a picture has next to no colour, as no stained section is.

    Measured on 3,227 stained patches and as many made grey: docs/data-scale.md.
    """
    small = rgb_on_white(image).resize((_SEEN, _SEEN), Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.int16)
    return bool(np.percentile(pixels.max(axis=2) - pixels.min(axis=2), 90) < GREY)
