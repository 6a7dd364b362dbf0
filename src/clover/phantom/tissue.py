"""The eight tissues: each function paints one architecture and notes where its nuclei are.

Source: own drawings after the textbook description of each tissue; scale is compressed where the
real structure (an alveolus, a glomerulus) would not fit a field of 179 um.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from clover.phantom.canvas import Canvas, ring, warp
from clover.phantom.case import SIZE, Tissue
from clover.phantom.texture import (
    Layer,
    Points,
    band_noise,
    ellipse_distance,
    fibre_noise,
    jittered_points,
    points_in,
    scatter_on,
    smooth_noise,
    soft_step,
    two_nearest,
)

Generator = np.random.Generator


def _loose_stroma(rng: Generator) -> Layer:
    """Return the density of loose connective tissue: fine fibres with clear gaps."""
    fibres = fibre_noise(rng, rng.uniform(0, np.pi), width=1.4, length=9.0)
    return np.clip(0.3 + 0.13 * fibres + 0.08 * smooth_noise(rng, 4.0), 0.04, 1)


def _mixed_stroma_nuclei(canvas: Canvas, rng: Generator, points: Points) -> None:
    kind = rng.integers(3, size=len(points))
    for number, name in enumerate(("small", "oval", "flat")):
        canvas.add(name, points[kind == number], is_parenchyma=False)


def colon(canvas: Canvas, rng: Generator) -> None:
    """Paint crypts cut across: goblet cells, basal nuclei, lamina propria between."""
    plane = warp(rng, 4.5)
    pitch = rng.uniform(68, 80)
    centres = jittered_points(rng, pitch, jitter=0.1, margin=45)
    nearest, _, which = two_nearest(plane.x, plane.y, centres, step=4)
    radii = (pitch / 2 - rng.uniform(4, 6)) * rng.uniform(0.9, 1.02, len(centres))
    lumens = radii * rng.uniform(0.14, 0.26, len(centres))
    radius, lumen = radii[which].astype(np.float32), lumens[which].astype(np.float32)
    inside = soft_step(radius - nearest)
    hollow = soft_step(lumen - nearest)
    granules = smooth_noise(rng, 1.0)
    canvas.cytoplasm += inside * (0.52 + 0.06 * granules)
    canvas.marker += inside * (0.8 + 0.1 * granules)
    stroma = 1 - inside
    canvas.cytoplasm += 0.55 * stroma * _loose_stroma(rng)
    canvas.collagen += 0.45 * stroma * _loose_stroma(rng)
    canvas.mucin += 0.45 * np.exp(-(((nearest - radius - 1) / 1.2) ** 2))

    goblets: list[Points] = []
    for centre, outer, inner in zip(centres, radii, lumens, strict=True):
        middle = (outer + inner) / 2 - 1.5
        points, _ = ring(centre, middle, 13.0, rng)
        goblets.append(points[rng.random(len(points)) < 0.85])
        # Crowded crypts are stratified: a second row of nuclei.
        rows = (6.5, 15.0) if canvas.spacing < 12 else (6.5,)
        for depth in rows:
            nuclei, direction = ring(centre, outer - depth, max(canvas.spacing * 0.72, 7.4), rng)
            canvas.add("column", plane.back(nuclei), direction)
    mucus = plane.back(np.concatenate(goblets))
    for layer in (canvas.cytoplasm, canvas.marker):
        canvas.stamp(layer, "goblet", mucus, rng=rng, blend="erase", strength=0.85)
        layer *= 1 - hollow
    canvas.stamp(canvas.mucin, "goblet", mucus, rng=rng, strength=1.0)
    canvas.mucin += 0.35 * hollow
    between = jittered_points(rng, canvas.spacing * 0.95)
    _mixed_stroma_nuclei(canvas, rng, points_in(nearest > radius + 3, between))


def squamous_epithelium(canvas: Canvas, rng: Generator) -> None:
    """Paint keratin lamellae, polygonal cells with bridges, a basal row and stroma beneath."""
    plane = warp(rng, 3.5)
    turn = rng.uniform(0, 2 * np.pi)
    middle = SIZE / 2
    depth = (plane.x - middle) * np.cos(turn) + (plane.y - middle) * np.sin(turn) + middle
    along = -(plane.x - middle) * np.sin(turn) + (plane.y - middle) * np.cos(turn)
    depth, along = depth.astype(np.float32), along.astype(np.float32)
    surface = rng.uniform(-4, 14)
    bottom = surface + rng.uniform(34, 46)
    pegs = rng.uniform(8, 15) * np.sin(along * 2 * np.pi / rng.uniform(60, 90) + rng.uniform(0, 6))
    base = (rng.uniform(166, 186) + pegs).astype(np.float32)
    tissue = soft_step(depth - surface)
    keratin = tissue * soft_step(bottom - depth, 2.0)
    epithelium = soft_step(depth - bottom, 2.0) * soft_step(base - depth)
    stroma = soft_step(depth - base)

    lamellae = np.sin(depth * 1.15 + 1.6 * smooth_noise(rng, 8.0))
    flaking = soft_step(0.9 - lamellae + (depth - surface - 6) / 6, 0.8)
    canvas.cytoplasm += keratin * flaking * (0.92 + 0.3 * lamellae)
    spacing = max(canvas.spacing * 1.22, 11.5)
    stretched = np.stack([depth * 1.2, along], axis=0)
    centres = jittered_points(rng, spacing, margin=60) - [0, middle]
    nearest, second, _ = two_nearest(stretched[0], stretched[1], centres)
    border = np.exp(-(((second - nearest) / 2.6) ** 2))
    ripening = np.clip((base - depth) / 160, 0, 1)
    canvas.cytoplasm += epithelium * (0.42 + 0.26 * ripening - 0.28 * border)
    canvas.cytoplasm += 0.04 * epithelium * smooth_noise(rng, 1.0)
    canvas.marker += epithelium * (0.3 + 0.75 * border)
    canvas.mucin += 0.3 * epithelium * ripening * (1 - border)
    canvas.mucin += 0.4 * np.exp(-(((depth - base) / 1.5) ** 2))
    canvas.cytoplasm += 0.45 * stroma * _loose_stroma(rng)
    canvas.collagen += 0.6 * stroma * _loose_stroma(rng)

    position = np.stack([centres[:, 0] / 1.2 - middle, centres[:, 1]], axis=1)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    points = plane.back(position @ rotation + middle)
    inside = np.all((points > -8) & (points < SIZE + 8), axis=1)
    points, level = points[inside], centres[inside, 0] / 1.2
    points_ok = points_in(epithelium > 0.6, points)
    level = level[_is_in(epithelium > 0.6, points)]
    upper = level < bottom + 28
    angles = np.full(len(points_ok), turn + np.pi / 2)
    canvas.add("flat", points_ok[upper], angles[upper])
    canvas.add("round", points_ok[~upper])
    basal = scatter_on(np.abs(base - depth - 7) < 3.5, rng, max(canvas.spacing * 0.72, 7.5))
    canvas.add("basal", basal, np.full(len(basal), turn))
    below = points_in(depth > base + 6, jittered_points(rng, canvas.spacing * 1.1))
    _mixed_stroma_nuclei(canvas, rng, below)


def _is_in(mask: NDArray[np.bool_], points: Points) -> NDArray[np.bool_]:
    column, row = np.clip(points.round().astype(int), 0, SIZE - 1).T
    result: NDArray[np.bool_] = mask[row, column]
    return result


def lymph_node(canvas: Canvas, rng: Generator) -> None:
    """Paint sheets of small lymphocytes and a follicle: pale centre, dark concentric mantle."""
    plane = warp(rng, 4.0)
    radius = rng.uniform(40, 50)
    mantle = rng.uniform(15, 19)
    centre = canvas.clear_of_regions(rng, radius + mantle, margin=58)
    stretch = rng.uniform(0.92, 1.1)
    distance = radius * ellipse_distance(
        plane.x, plane.y, centre=centre, radii=(radius * stretch, radius / stretch)
    )
    canvas.landmark = soft_step(radius + mantle + 3 - distance, 3.0)
    germinal = soft_step(radius - distance, 2.0)
    ring_shade = soft_step(radius + mantle - distance, 2.5) - germinal
    granules = smooth_noise(rng, 2.0)
    canvas.cytoplasm += 0.3 + 0.07 * granules + 0.2 * germinal
    canvas.nuclei += 0.2 * ring_shade + 0.06
    canvas.marker += 0.35 + 0.4 * germinal + 0.1 * granules
    droplets = soft_step(smooth_noise(rng, 2.0) - 1.9, 0.3)
    reticulin = np.exp(-((band_noise(rng, 40.0) / 0.09) ** 2))
    canvas.mucin += 0.06 + 0.7 * droplets + 0.5 * reticulin * (1 - germinal)

    spacing = canvas.spacing
    sheet = jittered_points(rng, spacing * 0.9)
    canvas.add("small", points_in(distance > radius + mantle, sheet))
    centroblasts = jittered_points(rng, max(spacing * 1.12, 13.0))
    canvas.add("pale", points_in(distance < radius - 3, centroblasts))
    shells = np.arange(radius + 2, radius + mantle, 7.2)
    for shell in shells:
        points, direction = ring(np.array(centre), shell, min(max(spacing * 0.8, 8.0), 11.0), rng)
        canvas.add("oval", plane.back(points), direction + np.pi / 2, is_parenchyma=False)
    for layer in (canvas.marker,):
        cells = points_in(distance > radius + mantle, sheet)
        canvas.stamp(layer, "cell", cells, rng=rng, strength=0.75)


def adipose_tissue(canvas: Canvas, rng: Generator) -> None:
    """Paint large round empty vacuoles in thin walls, nuclei pressed flat between them."""
    plane = warp(rng, 2.5)
    pitch = rng.uniform(50, 60)
    centres = jittered_points(rng, pitch, jitter=0.16, margin=40)
    nearest, second, which = two_nearest(plane.x, plane.y, centres)
    half_wall = float(np.interp(canvas.spacing, [9.0, 14.5, 29.0], [4.6, 2.4, 1.3]))
    to_wall = (second - nearest) / 2
    vacuole = soft_step(np.minimum(to_wall - half_wall, 0.56 * pitch - nearest))
    wall = 1 - vacuole
    canvas.cytoplasm += wall * (0.5 + 0.08 * smooth_noise(rng, 2.0))
    canvas.collagen += 0.25 * wall
    canvas.mucin += 0.75 * np.exp(-(((to_wall - half_wall) / 1.4) ** 2))
    canvas.marker += 0.75 * wall
    canvas.cytoplasm += 0.02
    points = scatter_on(wall > 0.5, rng, max(canvas.spacing * 1.2, 9.5))
    column, row = points.astype(int).T
    to_centre = centres[which[row, column]] - points
    angles = np.arctan2(to_centre[:, 1], to_centre[:, 0]) + np.pi / 2
    plump = rng.random(len(points)) < 0.45
    canvas.add("flat", points[~plump], angles[~plump])
    canvas.add("oval", points[plump], angles[plump])


def liver(canvas: Canvas, rng: Generator) -> None:
    """Paint plates of pink polygonal cells between sinusoids, and a central vein."""
    plane = warp(rng, 2.0, 8.0)
    radius = rng.uniform(19, 25)
    centre = canvas.clear_of_regions(rng, radius, margin=36)
    distance = ellipse_distance(plane.x, plane.y, centre=centre, radii=(radius, radius)) * radius
    vein = soft_step(radius - distance)
    canvas.landmark = soft_step(radius + 6 - distance, 3.0)
    field = band_noise(rng, 60.0)
    labyrinth = np.abs(field)
    slit = soft_step(0.24 - labyrinth, 0.1)
    spacing = float(np.clip(canvas.spacing * 1.22, 11.5, 33.0))
    centres = jittered_points(rng, spacing, margin=20)
    nearest, second, _ = two_nearest(plane.x, plane.y, centres)
    border = np.exp(-(((second - nearest) / 2.0) ** 2))
    plate = (1 - slit) * (1 - vein)
    granules = smooth_noise(rng, 1.0)
    canvas.cytoplasm += plate * (0.86 + 0.1 * granules - 0.26 * border)
    canvas.marker += plate * (0.75 + 0.14 * granules - 0.3 * border)
    canvas.mucin += plate * np.clip(0.42 + 0.22 * smooth_noise(rng, 2.0), 0, 1)
    canvas.collagen += 0.7 * np.exp(-(((distance - radius - 1.2) / 1.8) ** 2))
    canvas.cytoplasm += 0.05 * slit

    solid = (labyrinth > 0.4) & (distance > radius + 5)
    cells = points_in(solid, plane.back(centres))
    canvas.add("round", cells)
    double = cells[rng.random(len(cells)) < 0.12]
    canvas.add("round", double + rng.normal(0, 5.5, double.shape))
    lining = scatter_on((labyrinth < 0.12) & (distance > radius), rng, canvas.spacing * 2.4)
    canvas.add("flat", lining, _direction_along(field, lining), is_parenchyma=False)
    wall, direction = ring(np.array(centre), radius + 1, 17.0, rng)
    canvas.add("flat", plane.back(wall), direction + np.pi / 2, is_parenchyma=False)


def _direction_along(field: Layer, points: Points) -> NDArray[np.float64]:
    """Return the direction of a field's level lines at points [N, 2], in radians [N]."""
    column, row = np.clip(points.astype(int), 0, SIZE - 3).T
    slope_x = field[row, column + 2] - field[row, column]
    slope_y = field[row + 2, column] - field[row, column]
    direction: NDArray[np.float64] = np.arctan2(slope_y, slope_x) + math.pi / 2
    return direction


def smooth_muscle(canvas: Canvas, rng: Generator) -> None:
    """Paint fascicles that cross at angles, with cigar-shaped nuclei along the fibres."""
    plane = warp(rng, 7.0)
    num = int(rng.integers(2, 4))
    turn = rng.uniform(0, 2 * np.pi) + np.arange(num) * 2 * np.pi / num
    centres = SIZE / 2 + rng.uniform(45, 75) * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    nearest, second, which = two_nearest(plane.x, plane.y, centres)
    first = rng.uniform(0, np.pi)
    cleft = np.exp(-(((second - nearest) / 3.0) ** 2))
    for number in range(num):
        angle = first + number * np.pi / num + rng.uniform(-0.2, 0.2)
        member = which == number
        streaks = fibre_noise(rng, angle)
        canvas.cytoplasm += member * (0.68 + 0.17 * streaks)
        canvas.marker += member * (0.7 + 0.2 * streaks)
        canvas.mucin += member * np.clip(0.24 * streaks - 0.02, 0, 0.6)
        even = jittered_points(rng, canvas.spacing * 1.02, margin=120) - SIZE / 2
        even = even * [1.5, 0.72]
        rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        points = points_in(member & (cleft < 0.3), _in_field(even @ rotation + SIZE / 2))
        canvas.add("spindle", points, angle + rng.normal(0, 0.1, len(points)))
    for layer in (canvas.cytoplasm, canvas.marker):
        layer *= 1 - 0.8 * cleft
        np.clip(layer, 0.05, None, out=layer)


def _in_field(points: Points) -> Points:
    return points[np.all((points > -6) & (points < SIZE + 6), axis=1)]


def kidney(canvas: Canvas, rng: Generator) -> None:
    """Paint a glomerulus in Bowman's space among round tubules."""
    plane = warp(rng, 2.5)
    radius = rng.uniform(44, 52)
    centre = canvas.clear_of_regions(rng, radius, margin=52)
    distance = ellipse_distance(plane.x, plane.y, centre=centre, radii=(radius, radius)) * radius
    canvas.landmark = soft_step(radius + 5 - distance, 3.0)
    tuft = soft_step(radius - 7 + 2.5 * smooth_noise(rng, 8.0) - distance)
    capsule = np.exp(-(((distance - radius) / 1.6) ** 2))
    pitch = rng.uniform(40, 46)
    centres = jittered_points(rng, pitch, jitter=0.1, margin=25)
    offset = np.hypot(*(centres - centre).T)
    centres = centres[offset > radius + pitch * 0.3]
    nearest, second, which = two_nearest(plane.x, plane.y, centres)
    lumens = rng.uniform(5.0, 9.5, len(centres))
    edge = np.minimum((second - nearest) / 2 - 1.5, 0.62 * pitch - nearest)
    outside = soft_step(distance - radius - 2)
    tubule = outside * soft_step(np.minimum(edge, distance - radius - 3))
    hollow = soft_step(lumens[which].astype(np.float32) - nearest, 2.0)
    shade = rng.uniform(0.6, 0.9, len(centres))[which].astype(np.float32)
    granules = smooth_noise(rng, 1.0)
    canvas.cytoplasm += tubule * (1 - hollow) * (shade + 0.07 * granules)
    canvas.marker += tubule * (1 - hollow) * (0.8 + 0.1 * granules)
    canvas.mucin += outside * 0.75 * np.exp(-((edge / 1.3) ** 2)) + 0.3 * tubule * _rim(nearest)
    canvas.collagen += 0.3 * (outside - tubule).clip(0, 1)
    loops = soft_step(band_noise(rng, 17.0) - 0.7, 0.3)
    canvas.cytoplasm += tuft * (0.62 - 0.55 * loops) + 0.6 * capsule
    canvas.mucin += 0.6 * capsule + tuft * 0.7 * np.exp(-(((loops - 0.5) / 0.35) ** 2))
    canvas.marker += 0.25 * tuft * (1 - loops)

    tight = jittered_points(rng, max(canvas.spacing * 0.88, 9.0))
    canvas.add("small", points_in((tuft > 0.8) & (loops < 0.7), tight))
    wall, direction = ring(np.array(centre), radius, canvas.spacing * 1.5, rng)
    canvas.add("flat", plane.back(wall), direction + np.pi / 2, is_parenchyma=False)
    spacing = max(canvas.spacing, 9.5)
    rings = [ring(middle, pitch * 0.34, spacing, rng)[0] for middle in centres]
    points = plane.back(np.concatenate(rings))
    canvas.add("round", points_in((tubule > 0.7) & (hollow < 0.3), points))


def _rim(nearest: Layer) -> Layer:
    """Return the brush border around a tubule's lumen."""
    result: Layer = np.exp(-(((nearest - 9.5) / 1.5) ** 2))
    return result


def lung(canvas: Canvas, rng: Generator) -> None:
    """Paint air spaces with ragged, partly open septa, red cells and a few macrophages."""
    plane = warp(rng, 9.0, 16.0)
    pitch = rng.uniform(72, 88)
    centres = jittered_points(rng, pitch, jitter=0.26, margin=60)
    nearest, second, _ = two_nearest(plane.x, plane.y, centres, step=4)
    half_wall = float(np.interp(canvas.spacing, [9.0, 14.5, 29.0], [7.5, 5.5, 4.0]))
    rough = 1.6 * smooth_noise(rng, 4.0)
    gaps = soft_step(smooth_noise(rng, 16.0) - 1.35, 0.15)
    wall = soft_step(half_wall + rough - (second - nearest) / 2, 1.2) * (1 - gaps)
    capillaries = soft_step(band_noise(rng, 9.0) - 0.9, 0.4)
    canvas.cytoplasm += wall * (0.62 - 0.4 * capillaries)
    canvas.marker += 0.7 * wall * (1 - capillaries)
    canvas.collagen += 0.15 * wall
    canvas.mucin += 0.5 * wall * (1 - capillaries)
    cells = scatter_on(wall > 0.6, rng, max(canvas.spacing * 0.95, 8.6))
    plump = rng.random(len(cells)) < 0.55
    canvas.add("oval", cells[plump])
    canvas.add("small", cells[~plump])
    red = scatter_on((wall > 0.7) & (capillaries > 0.4), rng, 11.0)
    canvas.stamp(canvas.cytoplasm, "red cell", red, rng=rng, strength=1.25)
    spaces = jittered_points(rng, 50.0)
    clear = (second - nearest) / 2 > half_wall + 10
    macrophages = points_in(clear, spaces)[:7]
    canvas.stamp(canvas.cytoplasm, "macrophage", macrophages, rng=rng, strength=0.42)
    canvas.add("small", macrophages, is_parenchyma=False)


PAINTERS: dict[Tissue, Callable[[Canvas, Generator], None]] = {
    "colon": colon,
    "squamous epithelium": squamous_epithelium,
    "lymph node": lymph_node,
    "adipose tissue": adipose_tissue,
    "liver": liver,
    "smooth muscle": smooth_muscle,
    "kidney": kidney,
    "lung": lung,
}


def paint(canvas: Canvas, rng: Generator) -> None:
    """Paint the case's tissue."""
    PAINTERS[canvas.case.tissue](canvas, rng)
