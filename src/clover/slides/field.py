"""Fields of view: the squares of tissue that a model sees one at a time."""

from __future__ import annotations

import math

from clover.core.errors import CloverError
from clover.slides.reader import Slide
from clover.slides.region import Region
from clover.slides.tissue import TissueMask, find_tissue

LEAST_TISSUE = 0.5
"""A field with less tissue than this share is left out."""


def cover(region: Region, side_um: float) -> list[Region]:
    """Return squares of one size that lie in a region row by row, none over its edge.

    What is left over at the edges is shared between them. A region smaller than a field gives
    none.
    """
    columns, rows = int(region.width / side_um + 1e-9), int(region.height / side_um + 1e-9)
    left = region.x + (region.width - columns * side_um) / 2
    top = region.y + (region.height - rows * side_um) / 2
    return [
        Region(left + column * side_um, top + row * side_um, side_um, side_um)
        for row in range(rows)
        for column in range(columns)
    ]


def tissue_fields(
    slide: Slide,
    *,
    side_um: float,
    within: Region | None = None,
    least_tissue: float = LEAST_TISSUE,
    tissue: TissueMask | None = None,
) -> list[Region]:
    """Return the fields of a slide that show tissue, row by row.

    Args:
        slide: An open slide.
        side_um: Side of a field: the encoder's image size times its µm per pixel.
        within: Only here; the whole slide when absent.
        least_tissue: Share of a field that must be tissue.
        tissue: Already found tissue.

    Raises:
        CloverError: no field of that size fits, or none shows tissue.
    """
    if within is not None:
        slide.check(within)
    area = within or slide.extent
    squares = cover(area, side_um)
    if not squares:
        raise CloverError(
            f"{area.width:.0f} x {area.height:.0f} µm hold no field of {side_um:.0f} µm; "
            "take a larger region"
        )
    mask = tissue or find_tissue(slide)
    found = [square for square in squares if mask.share_of(square) >= least_tissue]
    if not found:
        raise CloverError(
            f"none of {len(squares):,} fields of {slide.path.name} is at least "
            f"{least_tissue:.0%} tissue"
        )
    return found


def spread(fields: list[Region], most: int) -> list[Region]:
    """Return at most so many of the fields, evenly spread in their order."""
    if len(fields) <= most:
        return fields
    step = len(fields) / most
    return [fields[math.floor((place + 0.5) * step)] for place in range(most)]
