"""Noise fields, points and grids that every tissue is built from.

Textures are made once for the process from a fixed seed and cropped for each image: filtering
noise afresh would cost more than everything else together.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from clover.phantom.case import SIZE

Layer = NDArray[np.float32]
Points = NDArray[np.float64]

_TILE = 256
_NUM_ANGLES = 16


def _filtered(seed: int, transfer: NDArray[np.float64]) -> Layer:
    """Return periodic unit-variance noise with the given transfer function [_TILE, _TILE]."""
    white = np.random.default_rng(seed).standard_normal((_TILE, _TILE))
    field = np.fft.ifft2(np.fft.fft2(white) * transfer).real
    field = (field - field.mean()) / field.std()
    return np.tile(field, (2, 2)).astype(np.float32)


@cache
def _frequencies() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    axis = np.fft.fftfreq(_TILE)
    vertical, horizontal = np.meshgrid(axis, axis, indexing="ij")
    return vertical, horizontal


@cache
def _smooth_tile(sigma: float) -> Layer:
    vertical, horizontal = _frequencies()
    power = -2 * (np.pi * sigma) ** 2 * (vertical**2 + horizontal**2)
    return _filtered(int(sigma * 10), np.exp(power))


@cache
def _band_tile(wavelength: float) -> Layer:
    vertical, horizontal = _frequencies()
    radius = np.hypot(vertical, horizontal)
    centre = 1 / wavelength
    return _filtered(1000 + int(wavelength), np.exp(-(((radius - centre) / (0.28 * centre)) ** 2)))


@cache
def _fibre_tile(angle_index: int, width: float, length: float) -> Layer:
    vertical, horizontal = _frequencies()
    angle = np.pi * angle_index / _NUM_ANGLES
    along = horizontal * np.cos(angle) + vertical * np.sin(angle)
    across = -horizontal * np.sin(angle) + vertical * np.cos(angle)
    power = -2 * np.pi**2 * ((length * along) ** 2 + (width * across) ** 2)
    return _filtered(2000 + angle_index, np.exp(power))


def _crop(rng: np.random.Generator, tile: Layer) -> Layer:
    top, left = rng.integers(_TILE, size=2)
    return tile[top : top + SIZE, left : left + SIZE]


def smooth_noise(rng: np.random.Generator, sigma: float) -> Layer:
    """Return unit-variance Gaussian noise [SIZE, SIZE] of correlation length `sigma` px."""
    return _crop(rng, _smooth_tile(sigma))


def band_noise(rng: np.random.Generator, wavelength: float) -> Layer:
    """Return unit-variance noise [SIZE, SIZE] with zero lines half a wavelength apart."""
    return _crop(rng, _band_tile(wavelength))


def fibre_noise(
    rng: np.random.Generator, angle: float, *, width: float = 1.2, length: float = 14.0
) -> Layer:
    """Return streaks [SIZE, SIZE] along `angle` (radians, from the x axis towards y)."""
    index = round(angle / np.pi * _NUM_ANGLES) % _NUM_ANGLES
    return _crop(rng, _fibre_tile(index, width, length))


@cache
def grid() -> tuple[Layer, Layer]:
    """Return the (x, y) coordinates of every pixel, each [SIZE, SIZE]."""
    axis = np.arange(SIZE, dtype=np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return x, y


def soft_step(value: NDArray[np.floating], width: float = 1.0) -> Layer:
    """Return 0 below -width, 1 above width, a ramp between: an edge without stairs."""
    result: Layer = np.clip(
        value * np.float32(0.5 / width) + np.float32(0.5), 0, 1, dtype=np.float32
    )
    return result


def ellipse_distance(
    x: Layer, y: Layer, *, centre: tuple[float, float], radii: tuple[float, float]
) -> Layer:
    """Return the distance to an ellipse's centre, in radii: 1 on its edge."""
    result: Layer = np.hypot((x - centre[0]) / radii[0], (y - centre[1]) / radii[1]).astype(
        np.float32
    )
    return result


def jittered_points(
    rng: np.random.Generator, spacing: float, *, jitter: float = 0.28, margin: float = 0.0
) -> Points:
    """Return points [N, 2] (x, y) on a turned, shaken hexagonal grid over the field.

    No two come closer than about (1 - 2 jitter) spacings, and there are no holes.
    """
    reach = SIZE * 0.75 + margin + spacing
    rows = np.arange(-reach, reach, spacing * 0.866)
    columns = np.arange(-reach, reach, spacing)
    y, x = np.meshgrid(rows, columns, indexing="ij")
    x = x + (np.arange(len(rows)) % 2 * spacing / 2)[:, None]
    points = np.stack([x.ravel(), y.ravel()], axis=1) + rng.uniform(0, spacing, 2)
    turn = rng.uniform(0, np.pi)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    points = points @ matrix + SIZE / 2 + rng.uniform(-jitter, jitter, points.shape) * spacing
    inside = np.all((points > -margin) & (points < SIZE + margin), axis=1)
    result: NDArray[np.float64] = points[inside]
    return result


def points_in(mask: NDArray[np.bool_], points: Points) -> Points:
    """Return those points that lie on the mask [SIZE, SIZE]."""
    column, row = np.clip(points.round().astype(int), 0, SIZE - 1).T
    result: NDArray[np.float64] = points[mask[row, column]]
    return result


def scatter_on(mask: NDArray[np.bool_], rng: np.random.Generator, spacing: float) -> Points:
    """Return points spread over a thin mask, at most one a square of `spacing` px."""
    row, column = np.nonzero(mask)
    if len(row) == 0:
        return np.empty((0, 2))
    order = rng.permutation(len(row))
    row, column = row[order], column[order]
    offset_x, offset_y = rng.uniform(0, spacing, 2)
    square_x = ((column + offset_x) / spacing).astype(int)
    square_y = ((row + offset_y) / spacing).astype(int)
    first = np.unique(square_y * 1000 + square_x, return_index=True)[1]
    return np.stack([column[first], row[first]], axis=1).astype(float)


def two_nearest(
    x: Layer, y: Layer, centres: Points, *, step: Literal[2, 4] = 2
) -> tuple[Layer, Layer, NDArray[np.intp]]:
    """Return distances to the nearest and second nearest centre, and which is nearest.

    Their difference is zero on Voronoi borders. Computed on every second pixel and widened, for
    speed; `step` 4 is for coarse structures without thin walls.
    """
    from scipy.spatial import cKDTree

    sampled = np.stack([x[::step, ::step].ravel(), y[::step, ::step].ravel()], axis=1)
    found = cKDTree(centres).query(sampled, k=2)
    distance, index = np.asarray(found[0]), np.asarray(found[1])
    shape = (SIZE // step, SIZE // step)
    nearest = _double(distance[:, 0].reshape(shape).astype(np.float32))
    second = _double(distance[:, 1].reshape(shape).astype(np.float32))
    if step == 4:
        nearest, second = _double(nearest), _double(second)
    which = index[:, 0].reshape(shape).repeat(step, 0).repeat(step, 1)
    return nearest, second, which


def _double(small: Layer) -> Layer:
    """Widen [n, n] to [2n, 2n] linearly."""
    rows = np.empty((small.shape[0] * 2, small.shape[1]), dtype=np.float32)
    rows[::2] = small
    rows[1:-1:2] = (small[:-1] + small[1:]) * np.float32(0.5)
    rows[-1] = small[-1]
    full = np.empty((rows.shape[0], rows.shape[1] * 2), dtype=np.float32)
    full[:, ::2] = rows
    full[:, 1:-1:2] = (rows[:, :-1] + rows[:, 1:]) * np.float32(0.5)
    full[:, -1] = rows[:, -1]
    return full
