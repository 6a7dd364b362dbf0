"""Microns per pixel, with where the number comes from: a size that was guessed says so."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from clover.core.errors import CloverError

Origin = Literal["header", "user", "estimated"]
_LEAST, _MOST = 0.02, 200.0
"""An electron microscope is below, an overview photograph above."""


@dataclass(frozen=True)
class MicronsPerPixel:
    """The size of a full-resolution pixel.

    Attributes:
        x: Width in µm.
        y: Height in µm; scanners' pixels are not always square.
        origin: `header`: the file states it; `user`: a person stated it; `estimated`: worked out
            from the objective's power because a person asked for that.
    """

    x: float
    y: float
    origin: Origin

    def __post_init__(self) -> None:
        for value in (self.x, self.y):
            if not (math.isfinite(value) and _LEAST <= value <= _MOST):
                raise CloverError(
                    f"{value:g} µm per pixel is no size of a scan, it must be between "
                    f"{_LEAST:g} and {_MOST:g}; 0.25 is usual for 40x, 0.5 for 20x"
                )

    @property
    def mean(self) -> float:
        """The mean of both sides, in µm."""
        return (self.x + self.y) / 2

    def __str__(self) -> str:
        """Return ``0.499 µm/px (header)``."""
        return f"{self.mean:.4g} µm/px ({self.origin})"


def parse_microns_per_pixel(text: str) -> MicronsPerPixel:
    """Read what a user typed, ``0.25`` or ``0.25,0.26``.

    Raises:
        CloverError: not a number, or no size of a scan.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 2):
        raise CloverError(f"'{text}' is no size of a pixel; give µm per pixel, for instance 0.25")
    return MicronsPerPixel(values[0], values[-1], "user")


def estimated_from_power(power: float) -> MicronsPerPixel:
    """Return what an objective of this power usually gives: 10 µm/px divided by it."""
    return MicronsPerPixel(10 / power, 10 / power, "estimated")
