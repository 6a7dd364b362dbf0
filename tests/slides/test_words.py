"""Numbers and names that users write: µm per pixel, regions, references."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clover.core.errors import CloverError
from clover.slides.region import Region, file_of, parse_region, split_reference
from clover.slides.units import MicronsPerPixel, estimated_from_power, parse_microns_per_pixel


@pytest.mark.parametrize(
    "text", ["", "x", "1,2,3", "1,2,3,4,5", "1,2,nan,4", "1,2,0,4", "1,2,3,-4"]
)
def test_what_is_no_region_is_one_line(text: str) -> None:
    with pytest.raises(CloverError, match="x,y,width,height"):
        parse_region(text)


sides = st.floats(min_value=0.001, max_value=1e6)


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), sides, sides)
def test_a_region_s_text_reads_back(x: float, y: float, width: float, height: float) -> None:
    again = parse_region(str(Region(x, y, width, height)))
    assert again.x == pytest.approx(x, abs=6e-4) and again.height == pytest.approx(height, abs=6e-4)
    assert str(parse_region(str(again))) == str(again)


def test_a_reference_is_a_file_and_a_region(tmp_path: Path) -> None:
    assert split_reference("a/slide.svs#1,2,3.5,4") == (Path("a/slide.svs"), Region(1, 2, 3.5, 4))
    assert split_reference("plain.png") == (Path("plain.png"), None)
    named = tmp_path / "odd#name.png"
    named.touch()
    assert split_reference(named) == (named, None)
    assert split_reference("missing#1.png") == (Path("missing#1.png"), None)
    slide = tmp_path / "slide.svs"
    slide.touch()
    for wrong in ("there", "1,2,3", "1,2,3,x"):
        with pytest.raises(CloverError, match=f"'{wrong}' is no region"):
            split_reference(f"{slide}#{wrong}")


@pytest.mark.parametrize("text", ["", "big", "0", "-1", "nan", "1000", "0.5,0.5,0.5"])
def test_what_is_no_size_of_a_pixel_is_one_line(text: str) -> None:
    with pytest.raises(CloverError, match="pixel"):
        parse_microns_per_pixel(text)


def test_a_size_says_where_it_comes_from() -> None:
    assert parse_microns_per_pixel("0.25, 0.26") == MicronsPerPixel(0.25, 0.26, "user")
    assert estimated_from_power(20) == MicronsPerPixel(0.5, 0.5, "estimated")
    assert str(MicronsPerPixel(0.499, 0.499, "header")) == "0.499 µm/px (header)"


def test_the_file_of_a_name_is_told_without_looking_for_it() -> None:
    assert file_of("a/slide.svs#1,2,3.5,4") == "a/slide.svs"
    assert file_of("plain.png") == "plain.png" and file_of("odd#1.png") == "odd#1.png"
