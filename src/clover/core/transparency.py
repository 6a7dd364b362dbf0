"""Transparent pixels, as every reader of images here sees them: on white, like an empty slide."""

from __future__ import annotations

from PIL import Image

from clover.core.decoding import eight_bits

_WHITE = (255, 255, 255)


def on_white(image: Image.Image) -> Image.Image:
    """Return an image composed on white, RGB; one without transparency comes back as it is.

    Grey of 16 bits becomes 8.

    Raises:
        UnreadableImage: pixels that are 32-bit numbers.
    """
    image = eight_bits(image)
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image
    found = image.convert("RGBA")
    whole = Image.new("RGB", found.size, _WHITE)
    whole.paste(found, mask=found.getchannel("A"))
    return whole


def rgb_on_white(image: Image.Image) -> Image.Image:
    """Return an image as RGB, composed on white where it has transparency."""
    return on_white(image).convert("RGB")
