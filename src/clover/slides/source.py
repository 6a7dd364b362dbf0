"""Where pixels come from: OpenSlide for scanners' files and DICOM, Pillow for plain images.

A source knows pixels of levels and nothing of tissue; `reader.Slide` turns µm into them. Label and
macro pictures, which may show a patient's name, are never asked for.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from clover.core.decoding import UnreadableImage, decoding
from clover.core.errors import CloverError
from clover.core.transparency import rgb_on_white
from clover.slides.units import MicronsPerPixel, estimated_from_power

_SCANNERS = (".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".dcm", ".czi")
SLIDE_SUFFIXES = frozenset((*_SCANNERS, ".tif", ".tiff"))
"""Files that OpenSlide is tried on first."""
PLAIN_SUFFIXES = frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"])
_NEED_OPENSLIDE = SLIDE_SUFFIXES - PLAIN_SUFFIXES


class Source(Protocol):
    """Levels of pixels.

    Attributes:
        kind: Who read it: `openslide/aperio`, `openslide/dicom`, `image/png`, ...
        sizes: (width, height) of each level, the finest first.
        stated: What the file says of its pixels' size.
        power: The objective's power, where the file states it.
    """

    kind: str
    sizes: list[tuple[int, int]]
    stated: MicronsPerPixel | None
    power: float | None

    def read(self, level: int, box: tuple[int, int, int, int]) -> Image.Image:
        """Return the RGB pixels of (left, top, right, bottom) of a level, inside it.

        Raises:
            CloverError: the file is cut off or damaged there.
        """
        ...

    def close(self) -> None:
        """Close the file."""
        ...


class OpenSlideSource:
    """A scanner's file, or DICOM, through OpenSlide."""

    def __init__(self, path: Path, slide: Any) -> None:
        self._path, self._slide = path, slide
        properties = slide.properties
        self.kind = f"openslide/{properties.get('openslide.vendor', 'unknown')}"
        self.sizes = [(int(width), int(height)) for width, height in slide.level_dimensions]
        self.power = _number(properties.get("openslide.objective-power"))
        self.stated = _stated(
            _number(properties.get("openslide.mpp-x")), _number(properties.get("openslide.mpp-y"))
        )
        colour = properties.get("openslide.background-color", "FFFFFF")
        self._background = tuple(int(colour[place : place + 2], 16) for place in (0, 2, 4))

    def read(self, level: int, box: tuple[int, int, int, int]) -> Image.Image:
        """Return the RGB pixels of a box of a level."""
        import openslide

        left, top, right, bottom = box
        # OpenSlide wants the corner in pixels of level 0.
        corner = (
            round(left * self.sizes[0][0] / self.sizes[level][0]),
            round(top * self.sizes[0][1] / self.sizes[level][1]),
        )
        try:
            found = self._slide.read_region(corner, level, (right - left, bottom - top))
        except openslide.OpenSlideError as error:
            raise CloverError(
                f"{self._path} cannot be read at its pixels {left},{top} of level {level}: "
                f"{error}; the file is cut off or damaged, copy it again"
            ) from error
        # Where nothing was scanned the pixels are transparent.
        image = Image.new("RGB", found.size, self._background)
        image.paste(found, mask=found.getchannel("A"))
        return image

    def close(self) -> None:
        """Close the file."""
        self._slide.close()


class PlainSource:
    """An image of one level that Pillow reads whole."""

    def __init__(self, path: Path) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with decoding(), Image.open(path) as image:
                    self.kind = f"image/{(image.format or 'unknown').lower()}"
                    self.stated = _tiff_size(image)
                    self._image = rgb_on_white(image)
        except FileNotFoundError as error:
            raise CloverError(f"no image {path}") from error
        except UnreadableImage as error:
            if isinstance(error.__cause__, Image.DecompressionBombError):
                raise CloverError(
                    f"{path} is too large to be read as a plain image ({error}); "
                    "save it as a tiled pyramidal TIFF"
                ) from error
            raise CloverError(f"{path} cannot be read as a slide or an image: {error}") from error
        self.sizes = [self._image.size]
        self.power: float | None = None

    def read(self, level: int, box: tuple[int, int, int, int]) -> Image.Image:
        """Return the RGB pixels of a box."""
        return self._image.crop(box)

    def close(self) -> None:
        """Let the pixels go."""
        self._image.close()


def open_source(path: Path) -> Source:
    """Open a file with the reader that knows it.

    Raises:
        CloverError: no such file, of no known format, cut off, or OpenSlide is not installed.
    """
    if not path.is_file():
        raise CloverError(f"no slide or image {path}")
    if path.suffix.lower() not in SLIDE_SUFFIXES:
        return PlainSource(path)
    try:
        import openslide
    except ImportError as error:
        if path.suffix.lower() not in _NEED_OPENSLIDE:
            return PlainSource(path)
        raise CloverError(
            f"{path} is read by OpenSlide, which is not installed; "
            "pip install 'clover-pathology[slides]'"
        ) from error
    try:
        return OpenSlideSource(path, openslide.OpenSlide(path))
    except openslide.OpenSlideUnsupportedFormatError as error:
        if path.suffix.lower() not in _NEED_OPENSLIDE:
            return PlainSource(path)
        raise CloverError(
            f"{path} is no slide that OpenSlide knows: its beginning is damaged, the file is cut "
            "off, or of another format"
        ) from error
    except openslide.OpenSlideError as error:
        raise CloverError(
            f"{path} cannot be opened: {error}; the file is cut off or damaged, copy it again"
        ) from error


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _stated(x: float | None, y: float | None) -> MicronsPerPixel | None:
    if x is None or y is None:
        return None
    try:
        return MicronsPerPixel(x, y, "header")
    except CloverError:
        return None  # scanners write 0 for unknown


def suggestion(source: Source) -> str:
    """Return how to state the size of a pixel, with a hint where the objective is known."""
    hint = ""
    if source.power:
        usual = estimated_from_power(source.power).mean
        hint = f"; its objective of {source.power:g}x usually gives {usual:.3g}"
    return f"give it with --mpp, for instance --mpp 0.25{hint}"


def _tiff_size(image: Image.Image) -> MicronsPerPixel | None:
    """Return the size a TIFF states in pixels a centimetre.

    Dots an inch, in whatever format, are about screens and printers: never taken for tissue.
    """
    if image.format != "TIFF":
        return None
    tags = image.getexif()
    unit, x, y = tags.get(296), tags.get(282), tags.get(283)
    if unit != 3 or not x or not y:
        return None
    return _stated(10_000 / float(x), 10_000 / float(y))
