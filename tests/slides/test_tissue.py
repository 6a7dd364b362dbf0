"""Tissue against glass, and the fields that cover it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clover.core.errors import CloverError
from clover.slides.field import cover, spread, tissue_fields
from clover.slides.reader import open_slide
from clover.slides.region import Region
from clover.slides.tissue import TissueMask, find_tissue, otsu, tissue_of
from clover.slides.units import parse_microns_per_pixel


def overview(*, noise: int = 3) -> np.ndarray[Any, Any]:
    """Return glass [120, 160] with a pink disc, a speck of dust and a grey pen stroke."""
    random = np.random.default_rng(0)
    image = np.full((120, 160, 3), 243.0)
    rows, columns = np.mgrid[:120, :160]
    image[(rows - 60) ** 2 + (columns - 50) ** 2 < 30**2] = (205, 130, 175)
    image[20:22, 140:142] = (205, 130, 175)
    image[100:104, 100:150] = (90, 90, 92)
    return np.clip(image + random.integers(-noise, noise + 1, image.shape), 0, 255)


def test_otsu_parts_two_groups_between_them() -> None:
    values = np.concatenate([np.full(500, 10.0), np.full(100, 90.0)])
    assert 11 <= otsu(values) <= 90


def test_otsu_is_the_largest_variance_between_groups() -> None:
    values = np.random.default_rng(1).integers(0, 256, 400).astype(float)

    def between(threshold: float) -> float:
        low, high = values[values < threshold], values[values >= threshold]
        return float(len(low) * len(high) * (low.mean() - high.mean()) ** 2)

    best = max(between(value) for value in range(1, 256) if (values < value).any())
    assert between(otsu(values)) == pytest.approx(best)


def test_the_disc_is_tissue_and_dust_and_pen_are_not() -> None:
    mask = tissue_of(Image.fromarray(overview().astype(np.uint8)), pixel_um=8)
    rows, columns = np.mgrid[:120, :160]
    disc = (rows - 60) ** 2 + (columns - 50) ** 2 < 30**2
    assert (mask & disc).sum() / (mask | disc).sum() > 0.95
    assert not mask[:40, 120:].any() and not mask[98:, 95:].any()


def test_glass_alone_has_no_tissue_and_tissue_alone_no_glass() -> None:
    random = np.random.default_rng(0)
    glass = 243 + random.integers(-3, 4, (100, 100, 3))
    assert not tissue_of(Image.fromarray(glass.astype(np.uint8)), pixel_um=8).any()
    full = np.array((190, 110, 160)) + random.integers(-20, 21, (100, 100, 3))
    assert tissue_of(Image.fromarray(full.astype(np.uint8)), pixel_um=8).mean() > 0.95


def test_fields_cover_a_region_without_leaving_it() -> None:
    fields = cover(Region(100, 50, 1000, 450), 180)
    assert len(fields) == 5 * 2
    assert min(f.x for f in fields) >= 100 and max(f.right for f in fields) <= 1100
    assert fields[0].x - 100 == pytest.approx(1100 - fields[-1].right)
    assert len({(f.x, f.y) for f in fields}) == 10
    assert cover(Region(0, 0, 100, 100), 180) == []
    assert len(cover(Region(0, 0, 537.6, 179.2), 179.2)) == 3


def test_spread_keeps_ends_apart() -> None:
    fields = cover(Region(0, 0, 1000, 10), 10)
    chosen = spread(fields, 4)
    assert [int(field.x) for field in chosen] == [120, 370, 620, 870]
    assert spread(fields, 500) is fields


def test_share_of_a_region_is_counted_on_the_mask() -> None:
    mask = np.zeros((10, 10), bool)
    mask[:, 5:] = True
    tissue = TissueMask(mask, Region(0, 0, 1000, 1000))
    assert tissue.share_of(Region(400, 0, 200, 300)) == 0.5
    assert tissue.share_of(Region(0, 0, 300, 300)) == 0
    assert tissue.share == 0.5


def test_the_slide_s_tissue_is_where_it_is(svs: Path) -> None:
    with open_slide(svs) as slide:
        tissue = find_tissue(slide)
        assert 0.25 < tissue.share < 0.45
        # Dermis, and glass in the upper right corner (looked at by eye).
        assert tissue.share_of(Region(450, 1200, 150, 150)) > 0.95
        assert tissue.share_of(Region(900, 30, 150, 60)) == 0
        fields = tissue_fields(slide, side_um=179.2)
        assert len(fields) == 16
        with pytest.raises(CloverError, match="at least 50% tissue"):
            tissue_fields(slide, side_um=100, within=Region(850, 20, 220, 100))
        with pytest.raises(CloverError, match="hold no field of 179 µm"):
            tissue_fields(slide, side_um=179.2, within=Region(500, 500, 100, 100))


def test_a_slide_without_size_has_no_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (64, 64), "pink").save(path)
    with open_slide(path) as slide, pytest.raises(CloverError, match="--mpp"):
        tissue_fields(slide, side_um=10)
    with open_slide(path, parse_microns_per_pixel("4")) as slide:
        assert len(tissue_fields(slide, side_um=128)) == 4
