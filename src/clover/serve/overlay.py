"""Pictures for people: a heat map over an image, and an image in a terminal.

In: a Pillow image, and a map over its places. Out: an image, or text that a terminal shows as one.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

_HEAT = np.array([255.0, 70.0, 0.0])
_STRONGEST = 0.65
"""Share of heat in the hottest place: tissue stays visible under it."""
_COLUMNS = 48
_KITTY_CHUNK = 4096
_SIXEL_TERMINALS = ("sixel", "mlterm", "foot", "contour", "wezterm", "yaft")
"""Parts of names by which terminals that draw sixels call themselves."""
_SIXEL_WIDTH = 448
"""Pixels at most; a terminal does not scale sixels."""
_SIXEL_COLOURS = 256


def overlay(image: Image.Image, heat: Tensor) -> Image.Image:
    """Return an image with a heat map over it.

    Args:
        image: Any size and mode.
        heat: `[G, G]`, not negative; its least place stays clear, its greatest is hottest.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)  # [height, width, 3]
    values = heat.detach().float().cpu()
    spread = float(values.max() - values.min())
    scaled = (values - values.min()) / spread if spread > 0 else torch.zeros_like(values)
    size = pixels.shape[:2]
    # Bilinear between the centres of places: the map is no finer than its grid.
    smooth = F.interpolate(scaled[None, None], size=size, mode="bilinear", align_corners=False)
    share = _STRONGEST * smooth[0, 0].numpy()[..., None]
    mixed = (1 - share) * pixels + share * _HEAT
    return Image.fromarray(mixed.round().astype(np.uint8))


def drawer(
    is_terminal: bool, environment: Mapping[str, str] = os.environ
) -> Callable[[Image.Image], str] | None:
    """Return what turns an image into text for this terminal; none where it shows no colours."""
    if not is_terminal or environment.get("NO_COLOR"):
        return None
    if "kitty" in environment.get("TERM", "") or environment.get("KITTY_WINDOW_ID"):
        return kitty
    names = (environment.get("TERM", ""), environment.get("TERM_PROGRAM", "").lower())
    if any(known in name for name in names for known in _SIXEL_TERMINALS):
        return sixel
    if environment.get("COLORTERM") in ("truecolor", "24bit"):
        return half_blocks
    return None


def half_blocks(image: Image.Image, *, columns: int = _COLUMNS) -> str:
    """Return an image as coloured half blocks: each sign shows two pixels, one above the other."""
    height = max(2, round(columns * image.height / image.width / 2) * 2)
    small = np.asarray(image.convert("RGB").resize((columns, height), Image.Resampling.BOX))
    lines = []
    for above, below in zip(small[::2], small[1::2], strict=True):
        signs = [
            "\x1b[38;2;{};{};{}m\x1b[48;2;{};{};{}m▀".format(*top, *bottom)
            for top, bottom in zip(above.tolist(), below.tolist(), strict=True)
        ]
        lines.append("".join(signs) + "\x1b[0m")
    return "\n".join(lines) + "\n"


def kitty(image: Image.Image) -> str:
    """Return an image in kitty's graphics protocol: PNG in base64, in pieces.

    Source: https://sw.kovidgoyal.net/kitty/graphics-protocol/
    """
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    pieces = [data[start : start + _KITTY_CHUNK] for start in range(0, len(data), _KITTY_CHUNK)]
    text = []
    for number, piece in enumerate(pieces):
        more = int(number < len(pieces) - 1)
        head = f"a=T,f=100,c={_COLUMNS},m={more}" if number == 0 else f"m={more}"
        text.append(f"\x1b_G{head};{piece}\x1b\\")
    return "".join(text) + "\n"


def sixel(image: Image.Image) -> str:
    """Return an image in DEC's sixels: bands of six rows, in each a pass for every colour.

    At most 448 px wide, in 256 colours of its own.

    Source: DEC VT330/VT340 Programmer Reference Manual, chapter 14.
    """
    if image.width > _SIXEL_WIDTH:
        height = max(1, round(image.height * _SIXEL_WIDTH / image.width))
        image = image.resize((_SIXEL_WIDTH, height), Image.Resampling.BOX)
    reduced = image.convert("RGB").quantize(_SIXEL_COLOURS)
    places = np.asarray(reduced)  # [height, width], indices of colours
    palette = np.asarray(reduced.getpalette(), dtype=int).reshape(-1, 3)
    height, width = places.shape
    text = [f'\x1bPq"1;1;{width};{height}']
    for colour in np.unique(places):
        red, green, blue = np.round(palette[colour] * 100 / 255).astype(int)  # in percent
        text.append(f"#{colour};2;{red};{green};{blue}")
    for top in range(0, height, 6):
        band = places[top : top + 6]
        weights = 1 << np.arange(len(band))[:, None]
        passes = []
        for colour in np.unique(band):
            signs = ((band == colour) * weights).sum(axis=0) + 63
            passes.append(f"#{colour}{_run_lengths(signs)}")
        text.append("$".join(passes) + "-")  # $ goes back to the band's left, - to the next band
    return "".join(text) + "\x1b\\\n"


def _run_lengths(signs: NDArray[np.integer]) -> str:
    """Return sixels with runs of more than three written as a count."""
    cuts = np.flatnonzero(np.diff(signs)) + 1
    parts = []
    for run in np.split(signs, cuts):
        sign, count = chr(run[0]), len(run)
        parts.append(f"!{count}{sign}" if count > 3 else sign * count)
    return "".join(parts)
