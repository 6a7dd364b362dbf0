"""The same tissue is the same picture, whatever file it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clover.core.errors import CloverError
from clover.slides.reader import open_slide
from clover.slides.region import Region
from clover.slides.units import parse_microns_per_pixel

from .conftest import SLIDE_MPP, write_pyramid

PLACES = [Region(560, 560, 179.2, 179.2), Region(480.3, 801.7, 120, 90), Region(600, 700, 400, 300)]
NAMES = ["one level", "three levels", "half the magnification", "plain", "dicom"]


def read(scan: tuple[Path, str | None], place: Region, mpp: float) -> np.ndarray[Any, Any]:
    path, stated = scan
    with open_slide(path, parse_microns_per_pixel(stated) if stated else None) as slide:
        return np.asarray(slide.read(place, mpp)).astype(float)


def difference(first: Any, second: Any) -> float:
    """Return the root mean square difference, of 255."""
    return float(np.sqrt(np.mean((first - second) ** 2)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_region_is_the_same_picture_in_every_scan(scans: Any, name: str, place: Region) -> None:
    wanted = read(scans["svs"], place, 1.6)
    found = read(scans[name], place, 1.6)
    assert found.shape == wanted.shape
    # From the same pixels it is equal. A scan at half the magnification has lost detail for good;
    # what is left is nearer by far than the tissue a quarter of a field beside it.
    if name == "half the magnification":
        beside = Region(place.x + place.width / 4, place.y, place.width, place.height)
        limit = difference(read(scans["svs"], beside, 1.6), wanted) / 4
        assert abs(found.mean() - wanted.mean()) < 1
    else:
        limit = 0.0
    assert difference(found, wanted) <= limit


def test_size_is_the_region_s_at_the_wanted_resolution_and_levels_do_not_matter(scans: Any) -> None:
    for name in ("svs", "three levels", "half the magnification"):
        for mpp in (0.25, 0.8, 2.0):
            shape = read(scans[name], PLACES[0], mpp).shape
            assert shape == (round(179.2 / mpp), round(179.2 / mpp), 3)


def test_the_coarsest_level_that_is_twice_as_fine_is_read(scans: Any) -> None:
    with open_slide(scans["three levels"][0]) as slide:
        asked = []
        source = slide._source
        original = source.read

        def noted(level: int, box: Any) -> Any:
            asked.append(level)
            return original(level, box)

        source.read = noted
        for mpp in (0.3, 0.8, 1.0, 1.6, 2.0, 8.0):
            slide.read(Region(560, 560, 300, 300), mpp)
    assert asked == [0, 0, 0, 0, 1, 2]


def test_a_region_lands_where_its_microns_say(tmp_path: Path) -> None:
    # A bright square of 40 x 40 px at (100, 60): at 0.5 µm/px it begins at 50, 30 µm.
    image = np.zeros((300, 400, 3), np.uint8)
    image[60:100, 100:140] = 255
    path = tmp_path / "square.png"
    Image.fromarray(image).save(path)
    with open_slide(path, parse_microns_per_pixel("0.5")) as slide:
        assert np.asarray(slide.read(Region(50, 30, 20, 20), 0.5)).min() == 255
        around = np.asarray(slide.read(Region(40, 20, 40, 40), 1.0))[..., 0]
        assert around.shape == (40, 40)
        assert around[12:28, 12:28].min() == 255 and around[:8].max() == 0
        assert around.astype(float).sum() == pytest.approx(20 * 20 * 255, rel=0.02)


def test_pixels_need_not_be_square(tmp_path: Path) -> None:
    path = tmp_path / "flat.png"
    Image.new("RGB", (100, 100), "white").save(path)
    with open_slide(path, parse_microns_per_pixel("0.5,1.0")) as slide:
        assert (slide.extent.width, slide.extent.height) == (50, 100)
        assert slide.read(Region(0, 0, 50, 50), 0.5).size == (100, 100)


@pytest.mark.parametrize(
    "place",
    [Region(-5, 0, 50, 50), Region(1090, 0, 50, 50), Region(0, 1460, 50, 50), Region(9e6, 0, 1, 1)],
    ids=str,
)
def test_a_region_outside_is_one_line_with_the_slide_s_size(svs: Path, place: Region) -> None:
    with open_slide(svs) as slide, pytest.raises(CloverError, match="1108 x 1481 µm") as caught:
        slide.read(place, 0.8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "place",
    [
        Region(-0.2, 0, 0.1, 10),
        Region(0, -0.2, 10, 0.1),
        Region(-0.2, 0, 0.2, 10),
        Region(1107.9, 0, 0.1, 10),
        Region(0, 1480.6, 10, 0.1),
        Region(500, 500, 1e-9, 10),
    ],
    ids=str,
)
def test_a_region_of_which_the_edge_leaves_nothing_is_one_line(svs: Path, place: Region) -> None:
    with open_slide(svs) as slide, pytest.raises(CloverError, match=r"less than 0\.01 of a"):
        slide.read(place, 0.8)


def test_half_a_pixel_over_the_edge_is_forgiven_on_every_side(svs: Path) -> None:
    with open_slide(svs) as slide:
        right, bottom, over = slide.extent.right, slide.extent.bottom, 0.4 * SLIDE_MPP
        for place in (
            Region(-over, -over, 10, 10),
            Region(-over, 0, over + 0.02 * SLIDE_MPP, 10),
            Region(right - 10 + over, bottom - 10 + over, 10, 10),
            Region(right - 0.02 * SLIDE_MPP, 0, over, 10),
        ):
            for resolution in (SLIDE_MPP, 0.8, 20):
                assert slide.read(place, resolution).mode == "RGB"


def test_a_reading_of_too_many_pixels_is_refused_with_the_way_out(svs: Path) -> None:
    with open_slide(svs) as slide, pytest.raises(CloverError, match=r"at most 4,096 .* --tour"):
        slide.read(slide.extent, 0.1)


def test_size_comes_with_its_origin_and_the_user_s_word_goes_first(svs: Path) -> None:
    with open_slide(svs) as slide:
        assert slide.kind == "openslide/aperio"
        assert (slide.scale.mean, slide.scale.origin) == (SLIDE_MPP, "header")
    with open_slide(svs, parse_microns_per_pixel("0.25")) as slide:
        assert (slide.scale.mean, slide.scale.origin) == (0.25, "user")


def test_without_a_stated_size_nothing_is_guessed(tmp_path: Path, pixels: Any) -> None:
    path = write_pyramid(tmp_path / "unknown.tif", [pixels[:512, :512]], mpp=None)
    with open_slide(path) as slide:
        assert slide.microns_per_pixel is None and slide.size == (512, 512)
        assert slide.overview(100).size == (100, 100)
        with pytest.raises(CloverError, match=r"does not state its µm per pixel; .*--mpp"):
            slide.read(Region(0, 0, 10, 10), 0.8)
    with pytest.raises(CloverError, match="states no objective"):
        open_slide(path, estimate=True)


def test_dots_an_inch_of_a_picture_are_not_taken_for_tissue(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.tif"):
        Image.new("RGB", (64, 64), "white").save(tmp_path / name, dpi=(25400, 25400))
        with open_slide(tmp_path / name) as slide:
            assert slide.microns_per_pixel is None, name


@pytest.mark.parametrize("kept", [0, 100, 20_000, 700_000, -2_000])
def test_a_truncated_slide_is_one_line(svs: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cut.svs"
    path.write_bytes(svs.read_bytes()[:kept])
    try:
        with open_slide(path) as slide:
            slide.read(Region(560, 560, 179.2, 179.2), 0.8)
            slide.read(slide.extent, 2)
    except CloverError as error:
        assert "\n" not in str(error) and "cut off" in str(error)
    else:
        pytest.fail("a cut slide was read as if it were whole")


def test_damage_inside_is_told_where_it_is_read(svs: Path, tmp_path: Path) -> None:
    import tifffile

    with tifffile.TiffFile(svs) as found:
        page = found.pages[0]
        middle = len(page.dataoffsets) // 2
        start = page.dataoffsets[middle]
        length = page.dataoffsets[middle + 3] - start
    data = bytearray(svs.read_bytes())
    data[start : start + length] = bytes(length)
    path = tmp_path / "damaged.svs"
    path.write_bytes(data)
    with open_slide(path) as slide:
        slide.read(Region(560, 0, 50, 50), 0.8)  # elsewhere it is whole
        with pytest.raises(CloverError, match="cut off or damaged"):
            slide.read(slide.extent, 1)


def test_other_files_are_no_slides(tmp_path: Path) -> None:
    for name in ("no.svs", "no.png", "no.tif"):
        (tmp_path / name).write_text("text")
        with pytest.raises(CloverError, match=name):
            open_slide(tmp_path / name)
    with pytest.raises(CloverError, match="no slide or image"):
        open_slide(tmp_path / "absent.svs")


def test_small_levels_that_a_file_lacks_are_made_once(svs: Path, pixels: Any) -> None:
    with open_slide(svs) as slide:
        small = np.asarray(slide.overview(300)).astype(float)
        wanted = Image.fromarray(pixels).resize((small.shape[1], 300), Image.Resampling.BOX)
        assert difference(small, np.asarray(wanted).astype(float)) < 4
        assert slide._made_small is slide._made_small
        assert max(slide._made_small.size) <= 1024


def test_label_and_macro_are_never_asked_for(svs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import openslide

    def refuse(_: Any) -> None:
        raise AssertionError("an associated image was asked for")

    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(refuse))
    with open_slide(svs) as slide:
        slide.read(PLACES[0], 0.8)
        slide.overview(200)
    import clover.slides

    code = [path.read_text() for path in Path(clover.slides.__file__).parent.glob("*.py")]
    assert len(code) >= 8 and not any("associated_images" in text for text in code)
