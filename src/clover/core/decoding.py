"""What every reader of images here makes of a file: damage is one error, and grey is 8 bits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError

from clover.core.errors import CloverError

BROKEN = "broken image"
"""What is said of bytes that no decoder takes: so they will be tomorrow."""
UNSCALED = "32-bit grey image"
"""What is said of whole or floating numbers that no rule makes into grey."""
_OF_16_BITS = ("PNG", "PPM")
"""Formats whose grey of 16 bits Pillow calls mode I."""


class UnreadableImage(CloverError):
    """An image file that shows nothing.

    Attributes:
        kind: `BROKEN` or `UNSCALED`.
        reason: Why, in some words; the message has Pillow's own.
    """

    def __init__(self, message: str, *, kind: str, reason: str) -> None:
        super().__init__(message)
        self.kind, self.reason = kind, reason


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """Raise one error for all that Pillow raises: the type depends on which byte is broken.

    Raises:
        FileNotFoundError: the file is not there.
        UnreadableImage: anything else.
    """
    try:
        yield
    except (CloverError, FileNotFoundError):
        raise
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(message, kind=BROKEN, reason=_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "of no known format"
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels"
    return "cut off or damaged"


def eight_bits(image: Image.Image) -> Image.Image:
    """Return grey of 16 bits as 8; an image of another mode comes back as it is.

    Pillow's own conversion cuts everything above 255 off, which is white.

    Raises:
        UnreadableImage: 32 bits, whole or floating: no number of those is white.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _OF_16_BITS):
        levels = np.asarray(image).astype(np.uint32)
        grey = ((levels + 128) // 257).astype(np.uint8)  # 65,535 / 255 = 257
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            grey[levels == transparent] = 255
        return Image.fromarray(grey)
    if image.mode in ("I", "F"):
        raise UnreadableImage(
            f"pixels of 32-bit numbers (mode {image.mode}) have no fixed black and white; save "
            "the image with 8 or 16 bits",
            kind=UNSCALED,
            reason="no fixed black and white; save it with 8 or 16 bits",
        )
    return image
