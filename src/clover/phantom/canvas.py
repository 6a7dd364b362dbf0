"""What a tissue is painted on: one density layer a substance, and the places of its nuclei.

Colour comes later (`stain`): the same canvas under three stains is the same tissue.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from clover.phantom.case import SIZE, Case, Region
from clover.phantom.stamp import Blend, choose, paste
from clover.phantom.texture import Layer, Points, grid, smooth_noise

_SPACING = {"low": 29.0, "moderate": 14.5, "high": 9.0}


def _empty() -> Layer:
    return np.zeros((SIZE, SIZE), dtype=np.float32)


@dataclass
class Sites:
    """Nuclei of one kind that wait to be painted."""

    kind: str
    points: Points
    angles: NDArray[np.floating] | None = None
    is_parenchyma: bool = True
    """Whether these cells may divide or turn atypical: lining and stroma cells do not."""


@dataclass
class Canvas:
    """Density layers [SIZE, SIZE], 0 where nothing is, about 1 where a substance is dense."""

    case: Case
    cytoplasm: Layer = field(default_factory=_empty)
    mucin: Layer = field(default_factory=_empty)
    """What PAS paints: mucin, glycogen, basement membranes."""
    collagen: Layer = field(default_factory=_empty)
    marker: Layer = field(default_factory=_empty)
    """What the antibody of the immunohistochemistry binds to."""
    nuclei: Layer = field(default_factory=_empty)
    landmark: Layer = field(default_factory=_empty)
    """1 where fibrosis must not hide what the tissue is known by."""
    sites: list[Sites] = field(default_factory=list)

    @property
    def spacing(self) -> float:
        """Mean distance between nuclei in pixels, which is what cellularity means here."""
        return _SPACING[self.case.cellularity]

    def add(
        self,
        kind: str,
        points: Points,
        angles: NDArray[np.floating] | None = None,
        *,
        is_parenchyma: bool = True,
    ) -> None:
        """Note nuclei to be painted later."""
        if len(points):
            self.sites.append(Sites(kind, points, angles, is_parenchyma))

    def stamp(
        self,
        layer: Layer,
        kind: str,
        points: Points,
        *,
        rng: np.random.Generator,
        strength: float = 1.0,
        blend: Blend = "max",
    ) -> None:
        """Paste a body at each point of a layer, turned any way."""
        paste(layer, kind, points, choose(rng, len(points)), strength=strength, blend=blend)

    def drop_sites(self, mask: NDArray[np.bool_]) -> Points:
        """Remove the sites on a mask [SIZE, SIZE]; return where they were, [N, 2]."""
        removed: list[Points] = []
        for sites in self.sites:
            column, row = np.clip(sites.points.round().astype(int), 0, SIZE - 1).T
            hit = mask[row, column]
            removed.append(sites.points[hit])
            sites.points = sites.points[~hit]
            if sites.angles is not None:
                sites.angles = sites.angles[~hit]
        return np.concatenate(removed) if removed else np.empty((0, 2))

    def drop_sites_near(self, places: Points, radius: float) -> None:
        """Remove the sites within `radius` px of any of the places [N, 2]."""
        if len(places) == 0:
            return
        for sites in self.sites:
            offset = sites.points[:, None] - places[None]
            keep = np.all(np.hypot(offset[..., 0], offset[..., 1]) >= radius, axis=1)
            sites.points = sites.points[keep]
            if sites.angles is not None:
                sites.angles = sites.angles[keep]

    def tissue_layers(self) -> tuple[Layer, ...]:
        """Return the layers other than nuclei, to be faded together."""
        return self.cytoplasm, self.mucin, self.collagen, self.marker

    def clear_of_regions(
        self, rng: np.random.Generator, radius: float, *, margin: float
    ) -> tuple[float, float]:
        """Return a place for a landmark of `radius` px, as far from the findings as 12 trials give.

        `margin` is how near the field's edge its centre may come.
        """
        trials = rng.uniform(margin, SIZE - margin, (12, 2))
        gaps = [min((_gap(x, y, item) for item in self.case.regions), default=0) for x, y in trials]
        best = trials[int(np.argmax(np.minimum(gaps, radius)))]
        return float(best[0]), float(best[1])


def _gap(x: float, y: float, region: Region) -> float:
    return float(np.hypot(x - region.x, y - region.y)) - max(region.radius_x, region.radius_y)


@dataclass(frozen=True)
class Warp:
    """Pixel coordinates pushed about, and the way back for points."""

    x: Layer
    y: Layer
    shift_x: Layer
    shift_y: Layer

    def back(self, points: Points) -> Points:
        """Return where points of the warped plane lie in the picture (first order, [N, 2])."""
        column, row = np.clip(points.round().astype(int), 0, SIZE - 1).T
        shift = np.stack([self.shift_x[row, column], self.shift_y[row, column]], axis=1)
        result: NDArray[np.float64] = points - shift
        return result


def warp(rng: np.random.Generator, amount: float, sigma: float = 16.0) -> Warp:
    """Return coordinates pushed about by `amount` px, so that nothing is a perfect circle."""
    x, y = grid()
    shift_x = np.float32(amount) * smooth_noise(rng, sigma)
    shift_y = np.float32(amount) * smooth_noise(rng, sigma)
    return Warp(x + shift_x, y + shift_y, shift_x, shift_y)


def ring(
    centre: NDArray[np.floating],
    radius: float,
    spacing: float,
    rng: np.random.Generator,
    *,
    jitter: float = 0.12,
) -> tuple[Points, NDArray[np.float64]]:
    """Return points [N, 2] around a circle, about `spacing` px apart, and their directions [N]."""
    num = max(round(2 * np.pi * radius / spacing), 3)
    direction = np.arange(num) * 2 * np.pi / num + rng.uniform(0, 2 * np.pi)
    direction = direction + rng.uniform(-jitter, jitter, num) * 4 / num
    distance = radius + rng.uniform(-jitter, jitter, num) * spacing
    offset = np.stack([np.cos(direction), np.sin(direction)], axis=1) * distance[:, None]
    return np.asarray(centre) + offset, direction
