"""How alike two pictures are when one may be a turned, mirrored, cropped or brightened other.

A picture's *portrait* is its luminance on rings about its centre, radii evenly spaced in logarithm.
Turning it moves the portrait round the rings, mirroring reverses them, a crop about the centre
moves it outward; the best correlation over all of these is the likeness. Brightness and contrast
are divided out. Axis letters: R rings, A angles, M pictures.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clover.core.transparency import on_white

Floats = NDArray[np.float32]

RINGS = 16
ANGLES = 64
SIDE = 48
"""Pixels a side that are looked at: enough for tissue, too few for noise and compression."""
ALIKE = 0.6
"""Two pictures less alike than this are two."""
SURELY_ALIKE = 0.72
"""Two pictures at least as alike are one, whatever else is like them."""

_ABOVE_OTHERS = 0.3
# A smooth picture is a little like everything: between the two limits a pair counts only if it
# stands out so far from the picture's other candidates. Measured on LC25000's copies, which are
# turned by up to 25 degrees and cropped: test in tests/vision/test_likeness.py.
_OTHERS = 16
_USUAL_OTHER = 0.26
"""Median likeness of unrelated tissue: stands in where fewer than 16 others can be compared."""
_FREQUENCIES = 9
_OUTWARD = 4
"""Rings that a crop may move: 4 are a crop to 57 % of the side."""
_CANDIDATES = 32
_INNER, _OUTER = 0.12, 0.97
_FLOOR = 1.0
"""Added to norms (a portrait's is about 32), so that blank pictures are like nothing."""


@cache
def _rings() -> tuple[NDArray[np.intp], NDArray[np.intp], Floats, Floats]:
    radii = np.geomspace(_INNER, _OUTER, RINGS)[:, None] * SIDE / 2
    angles = np.arange(ANGLES) * 2 * np.pi / ANGLES
    middle = (SIDE - 1) / 2
    y, x = middle + radii * np.sin(angles), middle + radii * np.cos(angles)
    top = np.floor(y).astype(np.intp).clip(0, SIDE - 2)
    left = np.floor(x).astype(np.intp).clip(0, SIDE - 2)
    return top, left, (y - top).astype(np.float32), (x - left).astype(np.float32)


def portrait(image: Image.Image) -> Floats:
    """Return a picture's portrait [R, A], of mean 0 and deviation 1."""
    small = on_white(image).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.float32)
    top, left, down, right = _rings()
    upper = pixels[top, left] * (1 - right) + pixels[top, left + 1] * right
    lower = pixels[top + 1, left] * (1 - right) + pixels[top + 1, left + 1] * right
    found = upper * (1 - down) + lower * down  # [R, A]
    # A deviation under 4 of 255 levels is a blank picture's noise: it stays small.
    made: Floats = ((found - found.mean()) / max(float(found.std()), 4.0)).astype(np.float32)
    return made


def likeness(one: Floats, others: Floats) -> Floats:
    """Return the likeness of one portrait [R, A] to others [M, R, A]: [M], from about 0 to 1."""
    best = np.zeros(len(others), dtype=np.float32)
    spectrum = np.fft.rfft(one, axis=-1)
    spectra = np.fft.rfft(others, axis=-1)
    for outward in range(-_OUTWARD, _OUTWARD + 1):
        mine, theirs = _overlap(outward)
        norms = np.linalg.norm(one[mine]) * np.linalg.norm(others[:, theirs], axis=(1, 2))
        for turned in (spectrum[mine].conj(), spectrum[mine]):  # as it is, and in the mirror
            products = (turned * spectra[:, theirs]).sum(1)
            correlation = np.fft.irfft(products, n=ANGLES, axis=-1).max(-1)
            best = np.maximum(best, correlation / (norms + _FLOOR))
    return best


def _overlap(outward: int) -> tuple[slice, slice]:
    """Return which rings of one picture lie over which of another that is larger by a crop."""
    return (
        slice(max(0, outward), RINGS + min(0, outward)),
        slice(max(0, -outward), RINGS + min(0, -outward)),
    )


def _traits(portraits: Floats) -> Floats:
    """Return what no turn and no mirror changes [M, R, F]: the strength of each frequency."""
    spectra = np.fft.rfft(portraits, axis=-1)[..., :_FREQUENCIES]
    traits: Any = np.abs(spectra)
    traits[..., 0] = spectra[..., 0].real
    return np.asarray(traits, dtype=np.float32)


class Gallery:
    """Portraits to compare others with: by their traits first, the nearest then in full."""

    def __init__(self, portraits: Floats) -> None:
        """Take portraits [M, R, A], of which M about 5 KB each stay in memory."""
        self._portraits = portraits
        traits = _traits(portraits)
        self._flat = traits.reshape(len(traits), RINGS * _FREQUENCIES)
        self._norms = np.stack(
            [
                np.linalg.norm(traits[:, _overlap(outward)[1]], axis=(1, 2)) + _FLOOR
                for outward in range(-_OUTWARD, _OUTWARD + 1)
            ]
        )  # [shifts, M]

    def alike(self, one: Floats) -> list[tuple[int, float]]:
        """Return the place and likeness of each picture that a portrait [R, A] is like."""
        traits = _traits(one[None])[0]
        moved = np.zeros((2 * _OUTWARD + 1, RINGS, _FREQUENCIES), dtype=np.float32)
        for place, outward in enumerate(range(-_OUTWARD, _OUTWARD + 1)):
            mine, theirs = _overlap(outward)
            moved[place, theirs] = traits[mine] / (np.linalg.norm(traits[mine]) + _FLOOR)
        scores = (moved.reshape(len(moved), -1) @ self._flat.T / self._norms).max(0)  # [M]
        count = min(_CANDIDATES, len(scores))
        nearest = np.argpartition(-scores, count - 1)[:count]
        found = likeness(one, self._portraits[nearest])
        limit = _limit(found)
        return [
            (int(place), float(value))
            for place, value in zip(nearest, found, strict=True)
            if value >= limit
        ]


def _limit(found: Floats) -> float:
    """Return how alike a picture must be to be the same, given the likeness of all candidates."""
    missing = max(0, _OTHERS - len(found))
    others = np.concatenate([found, np.full(missing, _USUAL_OTHER, dtype=np.float32)])
    usual = float(np.quantile(others, 0.25))
    return min(max(ALIKE, usual + _ABOVE_OTHERS), SURELY_ALIKE)
