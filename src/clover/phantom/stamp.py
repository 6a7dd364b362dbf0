"""Nuclei and small bodies as ready-made stamps: drawn once for the process, pasted many times.

A stamp is a small patch of haematoxylin density. Painting 400 nuclei is then 400 slices, about a
millisecond, instead of 400 shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from clover.phantom.texture import Layer, Points

_OVERSAMPLING = 3
_NUM_ANGLES = 16
_NUM_VARIANTS = 6

Blend = Literal["max", "over", "erase"]
Shape = Callable[[Layer, Layer, np.random.Generator], Layer]


def _noise(rng: np.random.Generator, side: int, sigma: float) -> Layer:
    field = ndimage.gaussian_filter(rng.standard_normal((side, side)), sigma)
    result: Layer = (field / (field.std() + 1e-9)).astype(np.float32)
    return result


def _soft(value: NDArray[np.floating], width: float = 0.7) -> Layer:
    result: Layer = np.clip(value / width + 0.5, 0, 1).astype(np.float32)
    return result


def _lobed(x: Layer, y: Layer, rng: np.random.Generator, roughness: float) -> Layer:
    """Return the factor by which an outline leaves its ellipse, at every pixel's direction."""
    direction = np.arctan2(y, x)
    outline = np.ones_like(direction)
    for wave in (2, 3, 4, 5):
        phase = rng.uniform(0, 2 * np.pi)
        outline += roughness / wave * 2 * rng.normal() * np.cos(wave * direction + phase)
    return np.clip(outline, 0.6, 1.5).astype(np.float32)


def _nucleus(
    radius_x: float, radius_y: float, *, density: float, clumps: float, roughness: float = 0.06
) -> Shape:
    """Return a shape: an ellipse with a chromatin rim, clumps and one small nucleolus."""

    def draw(x: Layer, y: Layer, rng: np.random.Generator) -> Layer:
        size = rng.uniform(0.9, 1.1)
        distance = np.hypot(x / (radius_x * size), y / (radius_y * size))
        distance = distance / _lobed(x / radius_x, y / radius_y, rng, roughness)
        inside = _soft((1 - distance) * min(radius_x, radius_y))
        rim = np.exp(-(((distance - 0.86) / 0.16) ** 2))
        texture = _noise(rng, x.shape[0], 0.9 * _OVERSAMPLING)
        chromatin = 0.78 + 0.28 * rim + clumps * texture
        spot_x, spot_y = rng.uniform(-0.35, 0.35, 2)
        spot = np.exp(-(((x - spot_x * radius_x) ** 2 + (y - spot_y * radius_y) ** 2) / 1.6))
        result: Layer = (density * inside * np.clip(chromatin + 0.45 * spot, 0.25, 1.7)).astype(
            np.float32
        )
        return result

    return draw


def _atypical(x: Layer, y: Layer, rng: np.random.Generator) -> Layer:
    """Return a large, dark, misshapen nucleus with coarse clumps and big nucleoli."""
    size = rng.choice([7.0, 8.5, 10.0, 11.0])
    stretch = rng.uniform(1.0, 1.4)
    radius_x, radius_y = size * stretch**0.5, size / stretch**0.5
    distance = np.hypot(x / radius_x, y / radius_y)
    distance = distance / _lobed(x / radius_x, y / radius_y, rng, 0.17)
    inside = _soft((1 - distance) * size)
    texture = _noise(rng, x.shape[0], 1.2 * _OVERSAMPLING)
    rim = np.exp(-(((distance - 0.9) / 0.13) ** 2))
    chromatin = 0.82 + 0.4 * rim + 0.34 * texture
    for _ in range(rng.integers(1, 4)):
        spot_x, spot_y = rng.uniform(-0.5, 0.5, 2)
        spot = ((x - spot_x * radius_x) ** 2 + (y - spot_y * radius_y) ** 2) / 3.2
        chromatin = chromatin - 0.35 * np.exp(-spot / 2.4) + 1.0 * np.exp(-spot)
    result: Layer = (1.12 * inside * np.clip(chromatin, 0.3, 2.0)).astype(np.float32)
    return result


def _lymphocyte(x: Layer, y: Layer, rng: np.random.Generator) -> Layer:
    """Return a small round dark nucleus with clock-face clumps."""
    radius = rng.uniform(4.1, 4.7)
    distance = np.hypot(x, y) / (radius * _lobed(x, y, rng, 0.02))
    inside = _soft((1 - distance) * radius)
    texture = _noise(rng, x.shape[0], 0.8 * _OVERSAMPLING)
    result: Layer = (1.65 * inside * np.clip(0.95 + 0.16 * texture, 0.6, 1.4)).astype(np.float32)
    return result


def _neutrophil(x: Layer, y: Layer, rng: np.random.Generator) -> Layer:
    """Return three or four small dark lobes on an arc, joined by threads."""
    density = np.zeros_like(x)
    num_lobes = int(rng.integers(3, 5))
    spread = rng.uniform(2.0, 2.5)
    for lobe in range(num_lobes):
        turn = (lobe - (num_lobes - 1) / 2) * spread / 1.5
        centre_x, centre_y = 3.3 * np.cos(turn), 3.3 * np.sin(turn)
        radius = rng.uniform(1.7, 2.2)
        density = np.maximum(density, _soft(radius - np.hypot(x - centre_x, y - centre_y)))
    return (2.1 * density).astype(np.float32)


def _plate(x: Layer, y: Layer, rng: np.random.Generator) -> Layer:
    """Return a metaphase plate from the side: a black bar with frayed edges."""
    length, width = rng.uniform(7.0, 8.5), rng.uniform(2.2, 2.8)
    fray = 0.8 * _noise(rng, x.shape[0], 0.7 * _OVERSAMPLING)
    bar = np.minimum(width + fray - np.abs(y), length + fray - np.abs(x))
    return (2.9 * _soft(bar)).astype(np.float32)


def _anaphase(x: Layer, y: Layer, rng: np.random.Generator) -> Layer:
    """Return two parallel black bars drawn apart."""
    length, width, apart = rng.uniform(5.5, 7.0), 1.9, rng.uniform(4.0, 5.2)
    fray = 0.7 * _noise(rng, x.shape[0], 0.7 * _OVERSAMPLING)
    bend = 0.05 * x**2
    bars = width + fray - np.abs(np.abs(y) - apart - bend)
    return (2.9 * _soft(np.minimum(bars, length + fray - np.abs(x)))).astype(np.float32)


def _prometaphase(x: Layer, y: Layer, rng: np.random.Generator) -> Layer:
    """Return a black clot with short arms: chromosomes before they line up."""
    direction = np.arctan2(y, x)
    arms = 5.0 + 1.5 * np.cos(rng.integers(6, 9) * direction + rng.uniform(0, 6))
    fray = 0.9 * _noise(rng, x.shape[0], 0.7 * _OVERSAMPLING)
    return (2.8 * _soft(arms + fray - np.hypot(x, y))).astype(np.float32)


def _dust(x: Layer, y: Layer, rng: np.random.Generator) -> Layer:
    """Return a speck of broken nucleus."""
    radius = rng.uniform(0.7, 1.5)
    return (1.6 * _soft(radius - np.hypot(x, y * rng.uniform(0.8, 1.4)))).astype(np.float32)


def _ghost(x: Layer, y: Layer, rng: np.random.Generator) -> Layer:
    """Return the faint outline that a dead nucleus leaves."""
    distance = np.hypot(x / rng.uniform(4, 5.5), y / 4)
    result: Layer = (0.22 * np.exp(-(((distance - 0.9) / 0.2) ** 2))).astype(np.float32)
    return result


def _disc(radius: float, edge: float = 1.0) -> Shape:
    def draw(x: Layer, y: Layer, rng: np.random.Generator) -> Layer:
        size = radius * rng.uniform(0.88, 1.1)
        outline = _lobed(x, y, rng, 0.03)
        return _soft(size * outline - np.hypot(x, y), edge)

    return draw


# kind -> (half side in px, shape)
_SHAPES: dict[str, tuple[int, Shape]] = {
    "round": (8, _nucleus(5.0, 4.8, density=0.95, clumps=0.16)),
    "oval": (9, _nucleus(6.0, 4.1, density=1.0, clumps=0.16)),
    "column": (10, _nucleus(6.8, 3.6, density=1.1, clumps=0.15)),
    "pale": (10, _nucleus(6.2, 5.6, density=0.7, clumps=0.16, roughness=0.08)),
    "basal": (8, _nucleus(5.4, 3.8, density=1.2, clumps=0.14)),
    "spindle": (13, _nucleus(10.0, 2.6, density=1.05, clumps=0.14, roughness=0.04)),
    "flat": (11, _nucleus(7.5, 2.0, density=1.15, clumps=0.1, roughness=0.03)),
    "small": (8, _nucleus(4.2, 4.0, density=1.15, clumps=0.18, roughness=0.03)),
    "atypical": (17, _atypical),
    "lymphocyte": (7, _lymphocyte),
    "neutrophil": (7, _neutrophil),
    "plate": (12, _plate),
    "anaphase": (12, _anaphase),
    "prometaphase": (10, _prometaphase),
    "dust": (4, _dust),
    "ghost": (8, _ghost),
    "cell": (9, _disc(6.2, 1.5)),
    "goblet": (10, _disc(6.4, 1.6)),
    "clearing": (17, _disc(12.5, 4.0)),
    "red cell": (6, _disc(3.4, 1.2)),
    "macrophage": (12, _disc(8.5, 2.5)),
}
KINDS = tuple(_SHAPES)


@cache
def stamps(kind: str) -> tuple[Layer, ...]:
    """Return the variants of one kind, turned: index = angle * variants + variant."""
    half, shape = _SHAPES[kind]
    rng = np.random.default_rng([7, KINDS.index(kind)])
    fine = (np.arange((2 * half + 1) * _OVERSAMPLING) + 0.5) / _OVERSAMPLING - half - 0.5
    y, x = np.meshgrid(fine.astype(np.float32), fine.astype(np.float32), indexing="ij")
    side = 2 * half + 1
    made: list[Layer] = []
    for step in range(_NUM_ANGLES):
        angle = np.pi * step / _NUM_ANGLES
        turned_x = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
        turned_y = -x * np.float32(np.sin(angle)) + y * np.float32(np.cos(angle))
        for _ in range(_NUM_VARIANTS):
            patch = shape(turned_x, turned_y, rng)
            blocks = patch.reshape(side, _OVERSAMPLING, side, _OVERSAMPLING)
            made.append(np.ascontiguousarray(blocks.mean(axis=(1, 3))))
    return tuple(made)


@cache
def _room(kind: str) -> tuple[Layer, ...]:
    """Return what each stamp leaves of what lies beneath it."""
    return tuple(1 - np.minimum(3 * patch, 1) for patch in stamps(kind))


def choose(
    rng: np.random.Generator, num: int, angles: NDArray[np.floating] | None = None
) -> NDArray[np.int64]:
    """Return stamp indices for `num` bodies, along `angles` (radians) or any way round."""
    variant = rng.integers(_NUM_VARIANTS, size=num)
    if angles is None:
        step = rng.integers(_NUM_ANGLES, size=num)
    else:
        step = np.round(np.asarray(angles) / np.pi * _NUM_ANGLES).astype(np.int64) % _NUM_ANGLES
    result: NDArray[np.int64] = step * _NUM_VARIANTS + variant
    return result


def paste(
    layer: Layer,
    kind: str,
    points: Points,
    indices: NDArray[np.int64],
    *,
    blend: Blend = "max",
    strength: float = 1.0,
) -> None:
    """Paste one stamp at each point (x, y) into `layer`, in place.

    Args:
        layer: [SIZE, SIZE].
        kind: One of `KINDS`.
        points: [N, 2] in pixels; bodies may lie partly outside.
        indices: [N] from `choose`.
        blend: "max" keeps the darker, "over" hides what lies beneath, "erase" multiplies by
            1 - stamp.
        strength: Factor on the stamp; not for "over".
    """
    half = _SHAPES[kind][0]
    made, room = stamps(kind), _room(kind) if blend == "over" else ()
    height, width = layer.shape
    inside = np.all((points > -half) & (points < [width + half, height + half]), axis=1)
    whole = points[inside].round().astype(int).tolist()
    factor = np.float32(strength)
    for (x, y), index in zip(whole, indices[inside].tolist(), strict=True):
        rows = slice(max(half - y, 0), max(height - y + half, 0))
        columns = slice(max(half - x, 0), max(width - x + half, 0))
        patch = made[index][rows, columns]
        view = layer[max(y - half, 0) : y + half + 1, max(x - half, 0) : x + half + 1]
        if blend == "max":
            np.maximum(view, patch * factor, out=view)
        elif blend == "over":
            view *= room[index][rows, columns]
            view += patch
        else:
            view *= 1 - patch * factor
