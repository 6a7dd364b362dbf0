"""Pictures changed in a way that changes no answer, or that takes one thing away.

In: an RGB picture. Out: one of the same size. What is random is drawn from the picture's own name,
so that the same picture is changed in the same way in every run.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Change = Callable[[Image.Image, str], Image.Image]
"""A picture and its name in, a picture out."""

Floats = NDArray[np.float64]

# Absorption of red, green and blue by haematoxylin and by eosin, each of length 1; the third
# direction is at right angles to both, and holds what neither dye explains.
# Source: Ruifrok and Johnston 2001, "Quantification of histochemical staining by color
# deconvolution", Anal Quant Cytol Histol 23.
_HAEMATOXYLIN = (0.650, 0.704, 0.286)
_EOSIN = (0.072, 0.990, 0.105)
STAIN_SHIFT = 0.3
"""Each dye's density is multiplied by 1 minus to 1 plus this: as between laboratories."""
JPEG_QUALITY = 30


def _stain_matrix() -> Floats:
    dyes = np.array([_HAEMATOXYLIN, _EOSIN])
    dyes /= np.linalg.norm(dyes, axis=1, keepdims=True)
    rest = np.cross(dyes[0], dyes[1])
    return np.vstack([dyes, rest / np.linalg.norm(rest)])  # [3 dyes, 3 colours]


def grey(picture: Image.Image, name: str) -> Image.Image:
    """Return the luminance alone, in three equal channels."""
    return picture.convert("L").convert("RGB")


def stain(picture: Image.Image, name: str) -> Image.Image:
    """Return the picture with more or less of each dye: optical densities scaled, not colours."""
    digest = hashlib.sha256(f"stain {name}".encode()).digest()
    random = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    # Away from 1 by at least half the range: a shift that is drawn near 0 would test nothing.
    size = random.uniform(STAIN_SHIFT / 2, STAIN_SHIFT, 2) * random.choice((-1, 1), 2)
    return scale_stains(picture, haematoxylin=1 + float(size[0]), eosin=1 + float(size[1]))


def scale_stains(picture: Image.Image, *, haematoxylin: float, eosin: float) -> Image.Image:
    """Return the picture with the optical density of each dye multiplied."""
    light = (np.asarray(picture.convert("RGB"), dtype=np.float64) + 1) / 256
    matrix = _stain_matrix()
    densities = -np.log10(light) @ np.linalg.inv(matrix)  # [H, W, 3 dyes]
    densities *= np.array([haematoxylin, eosin, 1.0])
    shown = 256 * 10 ** -(densities @ matrix) - 1
    return Image.fromarray(np.clip(np.round(shown), 0, 255).astype(np.uint8))


def jpeg(picture: Image.Image, name: str) -> Image.Image:
    """Return the picture after a strong JPEG compression."""
    packed = io.BytesIO()
    picture.convert("RGB").save(packed, "JPEG", quality=JPEG_QUALITY)
    return Image.open(packed).convert("RGB")


def turned(picture: Image.Image, name: str) -> Image.Image:
    """Return the picture turned by a quarter: tissue on a slide has no upper side."""
    return picture.convert("RGB").transpose(Image.Transpose.ROTATE_90)


def mirrored(picture: Image.Image, name: str) -> Image.Image:
    """Return the picture mirrored left to right."""
    return ImageOps.mirror(picture.convert("RGB"))


CHANGES: dict[str, Change] = {
    "grey": grey,
    "stain": stain,
    "jpeg": jpeg,
    "turned": turned,
    "mirrored": mirrored,
}
