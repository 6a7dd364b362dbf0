"""The images that records name, each opened once: there, whole, its bytes' hash, its portrait."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from clover.vision.likeness import SIDE, Floats, portrait

_SLIDES = (".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".bif")


@dataclass(frozen=True)
class Picture:
    """What opening one image showed."""

    problem: str | None
    """Missing image, empty image, broken image; or nothing."""
    digest: str = ""
    """SHA-256 of its bytes, in hex."""
    portrait: Floats | None = None
    """Only where asked for, and not of a slide."""


def look(path: Path, *, with_portrait: bool) -> Picture:
    """Open an image.

    Args:
        path: The image; of a region of a slide (`slide.svs#...`) the slide is looked for.
        with_portrait: Also make what look-alikes are told by.
    """
    file = Path(str(path).partition("#")[0])
    if file.suffix.lower() in _SLIDES:  # gigabytes: not read through
        return Picture(None if file.is_file() else "missing image")
    try:
        data = file.read_bytes()
    except OSError:
        return Picture("missing image")
    if not data:
        return Picture("empty image")
    digest = hashlib.sha256(data).hexdigest()
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
            warnings.simplefilter("ignore")
            # A JPEG decodes at a fraction of its size, and is read to its end all the same.
            image.draft("L", (2 * SIDE, 2 * SIDE))
            image.load()
            return Picture(None, digest, portrait(image) if with_portrait else None)
    # Pillow's decoders fail with whatever type the broken byte leads to.
    except Exception:
        return Picture("broken image", digest)
