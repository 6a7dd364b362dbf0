"""A rectangle of tissue in µm, and how a record names one: ``slide.svs#x,y,width_um,height_um``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from clover.core.errors import CloverError

_EXAMPLE = (
    "x,y,width,height in µm from the slide's upper left corner, for instance 1200,800,180,180"
)


@dataclass(frozen=True)
class Region:
    """A rectangle in µm; x and y are its upper left corner, counted from the slide's."""

    x: float
    y: float
    width: float
    height: float

    def __post_init__(self) -> None:
        numbers = (self.x, self.y, self.width, self.height)
        if not all(math.isfinite(value) for value in numbers):
            raise CloverError(f"region {self}: every number must be finite; give {_EXAMPLE}")
        if min(self.width, self.height) <= 0:
            raise CloverError(f"region {self} has no area; give {_EXAMPLE}")

    def __str__(self) -> str:
        """Return ``x,y,width,height`` to a thousandth of a µm."""
        numbers = (self.x, self.y, self.width, self.height)
        return ",".join(f"{value:.3f}".rstrip("0").rstrip(".") for value in numbers)

    @property
    def area(self) -> float:
        """In µm²."""
        return self.width * self.height

    @property
    def right(self) -> float:
        """The right edge in µm."""
        return self.x + self.width

    @property
    def bottom(self) -> float:
        """The lower edge in µm."""
        return self.y + self.height


def parse_region(text: str) -> Region:
    """Read ``x,y,width,height``.

    Raises:
        CloverError: not four numbers, or no area.
    """
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 4:
        raise CloverError(f"'{text}' is no region; give {_EXAMPLE}")
    return Region(*numbers)


def split_reference(name: str | Path) -> tuple[Path, Region | None]:
    """Split an image's name into its file and, for a region of a slide, the region.

    A file whose own name holds a # is that file, also where it is missing.

    Raises:
        CloverError: what stands behind the # of a file is no region.
    """
    path = Path(name)
    file, mark, rest = str(name).rpartition("#")
    if not mark or not file or path.is_file():
        return path, None
    if rest.count(",") != 3 and not Path(file).is_file():
        return path, None
    return Path(file), parse_region(rest)


def file_of(name: str) -> str:
    """Return an image's name without the region, by the name alone: that of the slide, or its own.

    For what is grouped by slide where no folder to look in is known.
    """
    file, _, rest = name.rpartition("#")
    return file if file and rest.count(",") == 3 else name
