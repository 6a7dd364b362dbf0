"""Tiles put together again are the slide."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clover.core.errors import CloverError
from clover.slides.deepzoom import OVERLAP, TILE, num_levels, tile
from clover.slides.reader import Slide, open_slide


def decoded(slide: Slide, level: int, column: int, row: int) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(tile(slide, level, column, row)))).astype(float)


@pytest.fixture
def slide(tmp_path: Path) -> Slide:
    """Return a picture of 700 x 500 px whose colour says where it is."""
    rows, columns = np.mgrid[:500, :700]
    image = np.stack([columns / 3, rows / 2, np.full_like(rows, 90)], axis=-1)
    Image.fromarray(image.astype(np.uint8)).save(tmp_path / "a.png")
    return open_slide(tmp_path / "a.png")


def test_the_finest_level_is_the_picture_tile_by_tile(slide: Slide) -> None:
    last = num_levels(slide) - 1
    assert last == math.ceil(math.log2(700))
    whole = np.zeros((500, 700, 3))
    for row in range(2):
        for column in range(3):
            found = decoded(slide, last, column, row)
            left = column * TILE - (OVERLAP if column else 0)
            top = row * TILE - (OVERLAP if row else 0)
            whole[top : top + found.shape[0], left : left + found.shape[1]] = found
    wanted = np.asarray(slide.overview(700)).astype(float)
    assert np.abs(whole - wanted).mean() < 1.5


def test_each_level_is_half_of_the_next(slide: Slide) -> None:
    last = num_levels(slide) - 1
    shapes = [decoded(slide, level, 0, 0).shape[:2] for level in range(last)]
    assert shapes[last - 1] == (250, 255)
    assert shapes[last - 2] == (125, 175) and shapes[0] == (1, 1)


@pytest.mark.parametrize("place", [(-1, 0, 0), (99, 0, 0), (10, 3, 0), (10, 0, 2), (10, -1, 0)])
def test_there_is_no_tile_elsewhere(slide: Slide, place: tuple[int, int, int]) -> None:
    with pytest.raises(CloverError, match=r"level -?\d+"):
        tile(slide, *place)


def test_tiles_of_the_slide_join_without_a_seam(svs: Path) -> None:
    with open_slide(svs) as slide:
        level = num_levels(slide) - 2
        left, right = decoded(slide, level, 1, 2), decoded(slide, level, 2, 2)
        # Overlap: the last columns of one are the first of the other, but for JPEG's own error.
        joined = np.abs(left[:, -2:] - right[:, :2]).mean()
        assert joined < 0.5 * np.abs(left[:, -3:-1] - right[:, :2]).mean()
