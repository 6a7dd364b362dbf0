"""Findings, painted over a finished tissue so that each shows under every stain."""

from __future__ import annotations

import math

import numpy as np

from clover.phantom.canvas import Canvas, warp
from clover.phantom.case import SIZE, Region
from clover.phantom.stamp import choose, paste
from clover.phantom.texture import (
    Layer,
    Points,
    ellipse_distance,
    grid,
    jittered_points,
    points_in,
    smooth_noise,
    soft_step,
)

Generator = np.random.Generator


def fibrosis(canvas: Canvas, rng: Generator) -> None:
    """Lay two or three wavy bands of dense collagen across the field, with few nuclei."""
    x, y = grid()
    angle = rng.uniform(0, np.pi)
    sine, cosine = math.sin(angle), math.cos(angle)
    across = (y - SIZE / 2) * cosine - (x - SIZE / 2) * sine
    along = (x - SIZE / 2) * cosine + (y - SIZE / 2) * sine
    num = int(rng.integers(2, 4))
    pitch = SIZE / num
    swing = rng.uniform(7, 11) * np.sin(along * (6.28 / rng.uniform(110, 160)) + rng.uniform(0, 6))
    unrest = smooth_noise(rng, 16.0)
    waves = rng.uniform(2.2, 3.2) * np.sin(along * (6.28 / rng.uniform(26, 36)) + 1.6 * unrest)
    height = across + swing + rng.uniform(0, pitch) + 4 * unrest
    middle = np.mod(height, pitch) - pitch / 2
    half_width = (30.0 if num == 2 else 21.0) / 1.6
    band = soft_step(half_width - np.abs(middle), 1.8) * (1 - canvas.landmark)
    fibres = np.sin((middle + waves) * 1.2 + 1.1 * smooth_noise(rng, 4.0))
    for layer in canvas.tissue_layers():
        layer *= 1 - band
    canvas.nuclei *= 1 - band
    canvas.collagen += band * np.clip(0.72 + 0.42 * fibres, 0.05, 1.3)
    canvas.drop_sites(band > 0.35)
    sparse = points_in(band > 0.9, jittered_points(rng, 38.0))
    canvas.add("flat", sparse, angle + rng.normal(0, 0.2, len(sparse)), is_parenchyma=False)


def _region_distance(rng: Generator, region: Region) -> Layer:
    """Return the distance to a region's centre, 1 on its ragged edge."""
    plane = warp(rng, 5.0, 8.0)
    return ellipse_distance(
        plane.x, plane.y, centre=(region.x, region.y), radii=(region.radius_x, region.radius_y)
    )


def _region_mask(distance: Layer, region: Region) -> Layer:
    return soft_step((1 - distance) * min(region.radius_x, region.radius_y), 3.0)


def necrosis(canvas: Canvas, rng: Generator, region: Region) -> Layer:
    """Turn a region into pale granular matter with ghosts of nuclei and nuclear dust.

    Returns:
        Where it was painted [SIZE, SIZE], 1 inside its ragged edge and 0 outside.
    """
    mask = _region_mask(_region_distance(rng, region), region)
    ghosts = canvas.drop_sites(mask > 0.35)
    for layer in canvas.tissue_layers():
        layer *= 1 - 0.97 * mask
    canvas.nuclei *= 1 - mask
    granular = 0.46 + 0.16 * smooth_noise(rng, 1.0) + 0.1 * smooth_noise(rng, 4.0)
    canvas.cytoplasm += mask * np.clip(granular, 0.05, 1)
    canvas.marker += 0.06 * mask
    canvas.stamp(canvas.nuclei, "ghost", ghosts[:60], rng=rng)
    specks = points_in(mask > 0.85, jittered_points(rng, 8.5, jitter=0.6))
    canvas.stamp(canvas.nuclei, "dust", specks[rng.random(len(specks)) < 0.8], rng=rng)
    return mask


def infiltrate(canvas: Canvas, rng: Generator, region: Region) -> Layer:
    """Fill a region with lymphocytes, or with neutrophils in their pink cytoplasm.

    Returns:
        Where it was painted [SIZE, SIZE], as `necrosis`; stragglers outside are not in it.
    """
    distance = _region_distance(rng, region)
    mask = _region_mask(distance, region)
    lymphoid = canvas.case.infiltrate == "lymphoid"
    every = jittered_points(rng, 8.9 if lymphoid else 11.4, jitter=0.2)
    dense, fringe = points_in(mask > 0.4, every), points_in(distance < 1.45, every)
    stragglers = fringe[rng.random(len(fringe)) < 0.12]
    canvas.drop_sites(mask > 0.3)
    canvas.drop_sites_near(stragglers, 9.0)
    for layer in canvas.tissue_layers():
        layer *= 1 - 0.9 * mask
    canvas.nuclei *= 1 - mask
    canvas.cytoplasm += mask * (0.2 + 0.05 * smooth_noise(rng, 2.0))
    points = np.concatenate([dense, points_in(mask <= 0.4, stragglers)])
    if lymphoid:
        canvas.stamp(canvas.nuclei, "lymphocyte", points, rng=rng)
        return mask
    canvas.stamp(canvas.cytoplasm, "cell", points, rng=rng, strength=0.75)
    canvas.stamp(canvas.nuclei, "neutrophil", points, rng=rng)
    return mask


def choose_mitoses(canvas: Canvas, rng: Generator) -> Points:
    """Take several dividing cells out of the noted nuclei; return where they are, [N, 2]."""
    wanted = int(rng.integers(8, 12))
    places = _spread(_dividing_sites(canvas, rng), wanted, apart=28.0)
    canvas.drop_sites_near(places, 11.0)
    return places


def paint_mitoses(canvas: Canvas, rng: Generator, places: Points) -> list[Region]:
    """Put black figures in cleared, rounded cells; return where they are."""
    canvas.stamp(canvas.nuclei, "clearing", places, rng=rng, blend="erase")
    for layer in canvas.tissue_layers():
        canvas.stamp(layer, "clearing", places, rng=rng, blend="erase", strength=0.9)
    canvas.stamp(canvas.cytoplasm, "clearing", places, rng=rng, strength=0.22)
    kinds = rng.choice(3, size=len(places), p=[0.5, 0.25, 0.25])
    for number, kind in enumerate(("plate", "anaphase", "prometaphase")):
        canvas.stamp(canvas.nuclei, kind, places[kinds == number], rng=rng)
    return [Region("mitosis", float(x), float(y), 10.0, 10.0) for x, y in places]


def _dividing_sites(canvas: Canvas, rng: Generator) -> Points:
    """Return where cells that may divide lie, in random order, all inside the field."""
    points = [item.points for item in canvas.sites if item.is_parenchyma]
    # A field with next to no such cells left (fat under scars) still shows its figures.
    if sum(map(len, points)) < 12:
        points.append(jittered_points(rng, 45.0))
    every = np.concatenate(points)
    every = every[np.all((every > 14) & (every < SIZE - 14), axis=1)]
    return every[rng.permutation(len(every))]


def _spread(points: Points, wanted: int, *, apart: float) -> Points:
    """Return up to `wanted` of the points, no two nearer than `apart` px."""
    chosen: list[int] = []
    free = np.ones(len(points), dtype=bool)
    for index in range(len(points)):
        if len(chosen) == wanted:
            break
        if free[index]:
            chosen.append(index)
            offset = points - points[index]
            free &= (offset * offset).sum(axis=1) >= apart**2
    return points[chosen]


def paint_nuclei(canvas: Canvas, rng: Generator) -> None:
    """Paint every noted nucleus; with atypia, monstrous ones stand among the others."""
    monsters = _atypical_places(canvas, rng) if canvas.case.atypia else np.empty((0, 2))
    canvas.drop_sites_near(monsters, 10.0)
    for sites in canvas.sites:
        indices = choose(rng, len(sites.points), sites.angles)
        paste(canvas.nuclei, sites.kind, sites.points, indices, blend="over")
    canvas.stamp(canvas.nuclei, "atypical", monsters, rng=rng, blend="over")


def _atypical_places(canvas: Canvas, rng: Generator) -> Points:
    """Return well over half of the parenchymal places, with room for nuclei twice as wide."""
    points = np.concatenate(
        [item.points for item in canvas.sites if item.is_parenchyma] or [np.empty((0, 2))]
    )
    apart = float(np.clip(canvas.spacing * 1.5, 18.0, 26.0))
    return _spread(points[rng.permutation(len(points))], 150, apart=apart)
