"""A TIFF is a field of view or a whole slide by what its header says, whatever it is called."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.slides.conftest import write_header, write_pyramid

from clover.slides.picture import check_is_no_slide, is_whole_slide
from clover.slides.tiff import MOST_PIXELS, why_whole_slide

FIELD = np.zeros((512, 512, 3), np.uint8)


def test_plain_and_tiled_fields_of_view_stay_images(tmp_path: Path) -> None:
    plain = tmp_path / "plain.tif"
    Image.fromarray(FIELD).save(plain)
    # A focus stack: tiled pages of one size are no pyramid.
    stack = write_pyramid(tmp_path / "stack.tif", [FIELD, FIELD], mpp=None)
    one = write_pyramid(tmp_path / "one.tiff", [FIELD], mpp=0.5)
    camera = write_header(tmp_path / "camera.tif", 8000, 8000)
    assert MOST_PIXELS == 8000 * 8000
    for path in (plain, stack, one, camera):
        assert not is_whole_slide(path), path
        check_is_no_slide(path)


def test_smaller_levels_and_very_many_pixels_are_a_slide_s(tmp_path: Path) -> None:
    levels = [FIELD, FIELD[::2, ::2]]
    pyramid = write_pyramid(tmp_path / "PYRAMID.TIF", levels, mpp=None)
    assert why_whole_slide(pyramid) == "512 x 512 px, tiled and with smaller levels"
    large = write_header(tmp_path / "large.tif", 8001, 8000)
    assert why_whole_slide(large) == (
        "8,001 x 8,000 px, a field of view has at most 64,000,000 pixels"
    )
    tifffile = pytest.importorskip("tifffile")
    below = tmp_path / "below.ome.tif"
    with tifffile.TiffWriter(below, bigtiff=True) as out:
        out.write(levels[0], tile=(256, 256), photometric="rgb", subifds=1)
        out.write(levels[1], tile=(256, 256), photometric="rgb", subfiletype=1)
    assert is_whole_slide(below), "OME-TIFF's levels, in a BigTIFF"


def test_a_scanner_s_file_of_one_level_is_a_slide(svs: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "renamed.tif"
    shutil.copy(svs, renamed)
    assert why_whole_slide(renamed) == "2,220 x 2,967 px, from a scanner (aperio)"


@pytest.mark.parametrize("content", [b"", b"II*\x00", b"II*\x00\xff\xff\xff\x00", b"no TIFF"])
def test_what_cannot_be_read_is_left_to_whoever_opens_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.tif"
    path.write_bytes(content)
    assert not is_whole_slide(path) and not is_whole_slide(tmp_path / "absent.tif")
