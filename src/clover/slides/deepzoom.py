"""Tiles for a viewer, in Deep Zoom's layout: each level half of the next, the last the slide.

Source: Deep Zoom file format, as OpenSeadragon reads it (level 0 is one pixel).
"""

from __future__ import annotations

import io
import math

from clover.core.errors import CloverError
from clover.slides.reader import Slide

TILE = 254
OVERLAP = 1
_QUALITY = 82


def num_levels(slide: Slide) -> int:
    """Return how many levels a slide has in this layout."""
    return math.ceil(math.log2(max(slide.size))) + 1


def tile(slide: Slide, level: int, column: int, row: int) -> bytes:
    """Return one tile as JPEG.

    Args:
        slide: An open slide; its µm per pixel need not be known.
        level: 0 to `num_levels` - 1, which is full size.
        column: From the left.
        row: From the top.

    Raises:
        CloverError: no such tile, or the file is damaged there.
    """
    levels = num_levels(slide)
    if not 0 <= level < levels:
        raise CloverError(f"level {level} does not exist, {slide.path.name} has 0 to {levels - 1}")
    scale = 2 ** (levels - 1 - level)
    width, height = (math.ceil(side / scale) for side in slide.size)
    if not (0 <= column * TILE < width and 0 <= row * TILE < height):
        raise CloverError(f"level {level} of {slide.path.name} has no tile {column}, {row}")
    left, top = max(column * TILE - OVERLAP, 0), max(row * TILE - OVERLAP, 0)
    right = min((column + 1) * TILE + OVERLAP, width)
    bottom = min((row + 1) * TILE + OVERLAP, height)
    box = (
        left * scale,
        top * scale,
        min(right * scale, slide.size[0]),
        min(bottom * scale, slide.size[1]),
    )
    picture = slide.resampled(box, (right - left, bottom - top), float(scale))
    out = io.BytesIO()
    # Colour at full resolution: stains differ by colour at the width of a nucleus.
    picture.save(out, "JPEG", quality=_QUALITY, subsampling=0)
    return out.getvalue()
