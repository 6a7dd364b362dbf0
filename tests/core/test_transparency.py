"""A transparent picture is the same one to every reader: composed on white."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clover.core.config import EncoderConfig
from clover.core.transparency import on_white
from clover.model import open_image
from clover.serve.picture import open_stranger
from clover.slides.reader import open_slide
from clover.slides.region import Region
from clover.slides.units import parse_microns_per_pixel
from clover.vision.encoder import load_encoder
from clover.vision.image_processor import ImageProcessor, turn_view


def drawn() -> Image.Image:
    """Return red at all degrees of opacity, over what lies hidden below transparent pixels."""
    pixels = np.zeros((64, 64, 4), dtype=np.uint8)
    pixels[..., 0] = 200
    pixels[..., 3] = np.linspace(0, 255, 64, dtype=np.uint8)
    return Image.fromarray(pixels)


def saved(folder: Path, kind: str) -> Path:
    path = folder / "picture.png"
    if kind == "RGBA":
        drawn().save(path)
    elif kind == "LA":
        drawn().convert("LA").save(path)
    elif kind == "palette":
        flat = Image.new("P", (64, 64), 0)
        flat.putpalette([10, 20, 30, 200, 0, 0])
        flat.paste(1, (0, 0, 32, 64))
        flat.save(path, transparency=0)
    else:
        flat = Image.new("RGB", (64, 64), (1, 2, 3))
        flat.paste((200, 0, 0), (0, 0, 32, 64))
        flat.save(path, transparency=(1, 2, 3))
    return path


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "colour"])
def test_every_reader_sees_the_same_pixels(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path, kind)
    with open_slide(path, parse_microns_per_pixel("0.5")) as slide:
        expected = np.asarray(slide.read(Region(0, 0, 32, 32), 0.5))
    assert expected.max() == 255 and expected.min() < 255
    stranger = open_stranger(path.read_bytes(), max_pixels=10_000)
    for picture in (open_image(path), open_image(path.read_bytes()), stranger):
        assert np.array_equal(np.asarray(picture.convert("RGB")), expected)
    # Whoever opens the file alone, as the features' cache does, leaves it to the encoder.
    with Image.open(path) as opened:
        white = Image.fromarray(expected)
        for prepare in (
            load_encoder(EncoderConfig(kind="tiny", image_size=32, grid=4)).prepare,
            ImageProcessor(32),
            lambda image: ImageProcessor(32)(turn_view(image, 2)),
        ):
            assert torch.equal(prepare(opened), prepare(white))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_picture_without_transparency_is_left_as_it_is(mode: str) -> None:
    picture = Image.new(mode, (4, 4))
    assert on_white(picture) is picture
    opaque = Image.new("RGBA", (4, 4), (9, 8, 7, 255))
    assert on_white(opaque).getpixel((0, 0)) == (9, 8, 7)
