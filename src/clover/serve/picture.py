"""Strangers' images: from what a request carries to pixels, or a refusal before they are decoded.

In: a data URI, or an http(s) address where the server allows it. Out: bytes, then an opened image.
Only formats that Pillow decodes by itself are read: no PostScript, no plug-ins that call programs.
"""

from __future__ import annotations

import base64
import binascii
import io
import warnings

from PIL import Image, UnidentifiedImageError

from clover.core.errors import CloverError
from clover.core.transparency import rgb_on_white

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")
"""What is decoded."""
_LONGEST_SIDE = 65_500


def data_uri_bytes(uri: str, *, max_bytes: int) -> bytes:
    """Return the bytes of a `data:image/...;base64,...` address.

    Raises:
        CloverError: it is none, is not base64, is empty, or is too long.
    """
    head, comma, text = uri.partition(",")
    if not comma or not head.lower().startswith("data:image/"):
        raise CloverError(f"'{shown(uri)}' is not an image; send it as data:image/png;base64,... ")
    if not head.lower().endswith(";base64"):
        raise CloverError("the image's data URI is not base64; write data:image/png;base64,...")
    if len(text) * 3 // 4 > max_bytes:
        raise CloverError(f"the image has more than {max_bytes:,} bytes; send a smaller one")
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise CloverError(f"the image's base64 is broken: {error}") from error
    if not content:
        raise CloverError("the image has 0 bytes")
    return content


def open_stranger(content: bytes, *, max_pixels: int) -> Image.Image:
    """Decode an image whose size was looked at first.

    Args:
        content: The file.
        max_pixels: More are refused from the header alone.

    Raises:
        CloverError: not an image of a known format, too large, or broken.
    """
    try:
        with warnings.catch_warnings():
            # Pillow's own bomb warning comes at a size that is below our limit or above it.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(content), formats=FORMATS)
            width, height = opened.size
            if width * height > max_pixels or max(width, height) > _LONGEST_SIDE:
                raise CloverError(
                    f"the image is {width} x {height}, at most {max_pixels:,} pixels are read; "
                    "crop it or make it smaller"
                )
            opened.load()
            return rgb_on_white(opened)
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise CloverError(f"the image is none of {known}, or is broken") from error
    # Broken files make Pillow's decoders raise almost anything.
    except (Exception, Image.DecompressionBombError) as error:
        if isinstance(error, CloverError | MemoryError):
            raise
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise CloverError(f"the image cannot be read: {reason}") from error


def shown(text: str) -> str:
    """Return the beginning of what a client sent, fit to be shown in one line."""
    cut = text[:40] + ("..." if len(text) > 40 else "")
    return "".join(sign if sign.isprintable() else "?" for sign in cut)
