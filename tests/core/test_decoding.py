"""Grey of 16 bits is seen as such by every reader; what shows nothing is said to, in one way."""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clover.core.config import EncoderConfig
from clover.core.decoding import UNSCALED, UnreadableImage, decoding, eight_bits
from clover.core.errors import CloverError
from clover.core.transparency import on_white
from clover.data.check import check_file
from clover.model import open_image
from clover.serve.picture import open_stranger
from clover.slides.reader import open_slide
from clover.slides.region import Region
from clover.slides.units import parse_microns_per_pixel
from clover.vision.cache import FeatureCache
from clover.vision.encoder import load_encoder
from clover.vision.pictures import look

LEVELS = np.linspace(0, 65_535, 64 * 64).reshape(64, 64).round().astype(np.uint16)
EXPECTED = (LEVELS / 257).round().astype(np.uint8)
_ENCODER = load_encoder(EncoderConfig(kind="tiny", image_size=32, grid=4))


def deep(folder: Path, kind: str) -> Path:
    """Write grey of 16 bits."""
    path = folder / f"deep.{kind.split()[0]}"
    order = ">" if kind.endswith("big") else "<"
    mode = "I;16B" if order == ">" else "I;16"
    data = LEVELS.astype(f"{order}u2").tobytes()
    if kind == "pgm":
        path.write_bytes(b"P5 64 64 65535\n" + LEVELS.astype(">u2").tobytes())
    else:
        Image.frombytes(mode, (64, 64), data).save(path)
    return path


def damaged(folder: Path) -> Path:
    """Write a TIFF whose pixels begin at a fraction."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((24, 24, 3), 90, np.uint8)).save(buffer, "TIFF")
    data = bytearray(buffer.getvalue())
    (start,) = struct.unpack_from("<L", data, 4)
    (number,) = struct.unpack_from("<H", data, start)
    for entry in range(start + 2, start + 2 + 12 * number, 12):
        if struct.unpack_from("<H", data, entry)[0] == 273:  # where the strips begin
            struct.pack_into("<H", data, entry + 2, 5)
    path = folder / "damaged.tif"
    path.write_bytes(data)
    with pytest.raises(TypeError), Image.open(path) as opened:
        opened.load()
    return path


@pytest.mark.parametrize("kind", ["png", "tif", "tif big", "pgm"])
def test_every_reader_sees_all_levels_of_16_bits(tmp_path: Path, kind: str) -> None:
    path = deep(tmp_path, kind)
    seen = [open_image(path), open_image(path.read_bytes())]
    if kind != "pgm":
        seen.append(open_stranger(path.read_bytes(), max_pixels=10_000))
    if kind == "png":
        with open_slide(path, parse_microns_per_pixel("0.5")) as slide:
            seen.append(slide.read(Region(0, 0, 32, 32), 0.5))
    for picture in seen:
        assert np.array_equal(np.asarray(picture.convert("L")), EXPECTED)
    grey = Image.fromarray(EXPECTED)
    found = FeatureCache(tmp_path / "c", _ENCODER).decode(path, "0" * 64)
    assert np.array_equal(found, _ENCODER.prepare(grey))  # type: ignore[arg-type]
    shown = look(path, with_portrait=True)
    assert shown.problem is None and shown.portrait is not None and shown.portrait.std() > 0.5


def test_a_transparent_level_of_16_bits_is_white() -> None:
    picture = Image.fromarray(LEVELS)
    picture.info["transparency"] = int(LEVELS[3, 4])
    found = np.asarray(on_white(picture)).copy()
    assert found[3, 4] == 255
    found[3, 4] = EXPECTED[3, 4]
    assert np.array_equal(found, EXPECTED)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_of_32_bits_are_refused_by_name(tmp_path: Path, dtype: type) -> None:
    path = tmp_path / "measured.tif"
    Image.fromarray((LEVELS / 65_535).astype(dtype)).save(path)
    with pytest.raises(CloverError, match=r"measured\.tif .*32-bit numbers.*8 or 16 bits"):
        open_image(path)
    with pytest.raises(CloverError, match="8 or 16 bits"):
        open_stranger(path.read_bytes(), max_pixels=10_000)
    assert look(path, with_portrait=False).problem == UNSCALED
    records = tmp_path / "c.jsonl"
    records.write_text('{"image": "measured.tif", "caption": "c"}')
    assert f"1 {UNSCALED}s" in check_file(records).lines()
    found = FeatureCache(tmp_path / "c", _ENCODER).decode(path, "0" * 64)
    assert found.reason.startswith(UNSCALED) and found.source == str(path)  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_other_modes_are_left_as_they_are(mode: str) -> None:
    picture = Image.new(mode, (4, 4))
    assert eight_bits(picture) is picture


def test_a_damaged_tag_is_a_broken_image_to_every_reader(tmp_path: Path) -> None:
    path = damaged(tmp_path)
    with pytest.raises(CloverError, match=r"damaged\.tif cannot be read as an image"):
        open_image(path)
    found = FeatureCache(tmp_path / "c", _ENCODER).decode(path, "0" * 64)
    assert found.reason == "broken image (cut off or damaged)"  # type: ignore[union-attr]
    assert look(path, with_portrait=False).problem == "broken image"


def test_a_directory_beyond_every_file_is_no_whole_slide(tmp_path: Path) -> None:
    path = tmp_path / "far.tif"
    path.write_bytes(struct.pack("<2sHHHQ", b"II", 43, 8, 0, sys.maxsize * 2))
    with pytest.raises(CloverError, match="cannot be read as an image"):
        open_image(path)


def test_an_error_without_words_is_called_by_its_type() -> None:
    with pytest.raises(UnreadableImage, match="IndexError"), decoding():
        raise IndexError
    with pytest.raises(FileNotFoundError), decoding():
        raise FileNotFoundError
