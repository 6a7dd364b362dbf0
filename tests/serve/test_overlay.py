"""Heat maps and terminal pictures."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import torch
from PIL import Image

from clover.serve.overlay import drawer, half_blocks, kitty, overlay, sixel


def test_heat_lies_where_the_map_is_greatest_and_nowhere_else() -> None:
    grey = Image.new("RGB", (36, 36), (100, 100, 100))
    heat = torch.zeros(4, 4)
    heat[0, 3] = 2.0
    pixels = np.asarray(overlay(grey, heat)).astype(int)
    expected = np.array([201, 80, 35])  # 0.35 x 100 + 0.65 x (255, 70, 0)
    assert np.abs(pixels[4, 31] - expected).max() <= 1
    assert pixels[31, 4].tolist() == [100, 100, 100]
    assert np.asarray(overlay(grey, torch.ones(4, 4))).tolist() == np.asarray(grey).tolist()


def test_half_blocks_show_two_pixels_a_sign() -> None:
    image = Image.new("RGB", (2, 2))
    for place, colour in {(0, 0): (1, 2, 3), (1, 0): (4, 5, 6), (0, 1): (7, 8, 9)}.items():
        image.putpixel(place, colour)
    expected = "\x1b[38;2;1;2;3m\x1b[48;2;7;8;9m▀\x1b[38;2;4;5;6m\x1b[48;2;0;0;0m▀\x1b[0m\n"
    assert half_blocks(image, columns=2) == expected


def test_kittys_pieces_are_one_png() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    text = kitty(Image.fromarray(noise))
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text)
    assert len(pieces) > 1
    assert [head.split("m=")[1] for head, _ in pieces] == ["1"] * (len(pieces) - 1) + ["0"]
    found = Image.open(io.BytesIO(base64.b64decode("".join(data for _, data in pieces))))
    assert np.asarray(found).tolist() == noise.tolist()


def read_sixels(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw sixels as a terminal does: colours in percent [height, width, 3], and what was set."""
    body = re.fullmatch(r"\x1bPq(.*)\x1b\\\n", text, re.S)
    assert body is not None
    width, height = map(int, re.match(r'"1;1;(\d+);(\d+)', body[1]).groups())  # type: ignore[union-attr]
    pixels, is_set = np.zeros((height, width, 3), int), np.zeros((height, width), int)
    colours: dict[int, list[int]] = {}
    x = y = colour = 0
    token = re.compile(r'"[\d;]+|#(\d+)(?:;2;(\d+);(\d+);(\d+))?|!(\d+)([?-~])|([?-~])|(\$)|(-)')
    for found in token.finditer(body[1]):
        number, red, green, blue, count, repeated, sign, back, down = found.groups()
        if red is not None:
            colours[int(number)] = [int(red), int(green), int(blue)]
        elif number is not None:
            colour = int(number)
        elif back or down:
            x, y = 0, y + 6 * bool(down)
        elif sign or repeated:
            end = x + int(count or 1)
            for row in range(6):
                if (ord(sign or repeated) - 63) >> row & 1:
                    pixels[y + row, x:end] = colours[colour]
                    is_set[y + row, x:end] += 1
            x = end
    return pixels, is_set


def test_sixels_draw_every_pixel_once_in_its_colour() -> None:
    random = np.random.default_rng(0)
    few = random.integers(0, 256, (40, 3), dtype=np.uint8)
    image = Image.fromarray(few[random.integers(0, 40, (20, 31))])  # 20 is no multiple of 6
    pixels, is_set = read_sixels(sixel(image))
    assert (is_set == 1).all() and pixels.shape == (20, 31, 3)
    assert np.abs(pixels * 2.55 - np.asarray(image)).max() <= 1.5
    flat = sixel(Image.new("RGB", (400, 6), (255, 0, 0)))
    assert "!400~" in flat and len(flat) < 60
    assert read_sixels(sixel(Image.new("RGB", (900, 90))))[0].shape == (45, 448, 3)


def test_a_terminal_is_drawn_on_only_as_it_can() -> None:
    assert drawer(False, {"TERM": "xterm-kitty"}) is None
    assert drawer(True, {"TERM": "xterm-kitty"}) is kitty
    assert drawer(True, {"TERM": "xterm", "COLORTERM": "truecolor"}) is half_blocks
    assert drawer(True, {"TERM": "foot", "COLORTERM": "truecolor"}) is sixel
    assert drawer(True, {"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}) is sixel
    assert drawer(True, {"TERM": "xterm"}) is None
    assert drawer(True, {"COLORTERM": "truecolor", "NO_COLOR": "1"}) is None
