"""A slide: tissue in µm in, pixels at a wanted µm per pixel out, whatever the file's levels are.

The same rectangle of tissue read at the same µm per pixel is the same picture from a 20x and a 40x
scan, from any level, in any format.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

from PIL import Image

from clover.core.errors import CloverError
from clover.slides.region import Region
from clover.slides.source import Source, open_source, suggestion
from clover.slides.units import MicronsPerPixel, estimated_from_power

MAX_SIDE = 4096
"""Pixels along a side of one reading: 50 MB in memory."""
_LEAST = 0.01
"""Pixels of the finest level along a side of what a region has on its slide."""
_MARGIN = 4
"""Pixels read around a region, so that its edge is resampled from tissue, not from a border."""
_OVERVIEW = 1024
"""Longer side in pixels of the picture that stands in for small levels a file lacks."""
_STRIP = 1 << 24
"""Pixels read at once while that picture is made."""


class Slide:
    """An open slide or image.

    Attributes:
        path: The file.
        microns_per_pixel: Of the finest level; None where nobody stated it.
    """

    def __init__(
        self, path: Path, source: Source, microns_per_pixel: MicronsPerPixel | None
    ) -> None:
        self.path = path
        self.microns_per_pixel = microns_per_pixel
        self._source = source
        self._lock = threading.Lock()

    @property
    def kind(self) -> str:
        """Who read it and what it is, for instance ``openslide/aperio``."""
        return self._source.kind

    @property
    def power(self) -> float | None:
        """The objective's power, where the file states it."""
        return self._source.power

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the finest level, in pixels."""
        return self._source.sizes[0]

    @property
    def scale(self) -> MicronsPerPixel:
        """The size of a pixel.

        Raises:
            CloverError: nobody stated it.
        """
        if self.microns_per_pixel is None:
            raise CloverError(
                f"{self.path} does not state its µm per pixel; {suggestion(self._source)}"
            )
        return self.microns_per_pixel

    def scaled(self, microns_per_pixel: MicronsPerPixel | None, *, estimate: bool = False) -> Slide:
        """Return the same open file with the size of a pixel that the user states.

        Args:
            microns_per_pixel: It goes before what the file states.
            estimate: Take what the objective's power usually gives where the file states no size.

        Raises:
            CloverError: no power to estimate from.
        """
        source = self._source
        scale = microns_per_pixel or source.stated
        if scale is None and estimate:
            if source.power is None:
                raise CloverError(
                    f"{self.path} states no objective to estimate from; {suggestion(source)}"
                )
            scale = estimated_from_power(source.power)
        return Slide(self.path, source, scale)

    @property
    def extent(self) -> Region:
        """The whole slide in µm."""
        width, height = self.size
        return Region(0, 0, width * self.scale.x, height * self.scale.y)

    def check(self, region: Region) -> None:
        """Check that a region lies on the slide; half a pixel over its edge is forgiven.

        Raises:
            CloverError: it does not, or nothing of it is left once the edge has cut it.
        """
        whole, slack = self.extent, self.scale.mean / 2
        is_inside = (
            min(region.x, region.y) >= -slack
            and region.right <= whole.right + slack
            and region.bottom <= whole.bottom + slack
        )
        if not is_inside:
            raise CloverError(
                f"region {region} µm reaches beyond {self.path.name}, which is "
                f"{whole.width:.0f} x {whole.height:.0f} µm ({self.scale})"
            )
        width = min(region.right, whole.right) - max(region.x, 0.0)
        height = min(region.bottom, whole.bottom) - max(region.y, 0.0)
        if width < _LEAST * self.scale.x or height < _LEAST * self.scale.y:
            raise CloverError(
                f"region {region} µm holds less than {_LEAST:g} of a pixel of {self.path.name}, "
                f"which is {whole.width:.0f} x {whole.height:.0f} µm ({self.scale}); move it onto "
                "the slide or make it larger"
            )

    def read(self, region: Region, microns_per_pixel: float) -> Image.Image:
        """Return a region's tissue at a wanted resolution, RGB.

        The picture comes from the coarsest level that is twice as fine, or else from the finest; a
        wanted resolution beyond the slide's own is interpolated.

        Args:
            region: In µm, inside the slide.
            microns_per_pixel: Of the picture, both ways.

        Raises:
            CloverError: no µm per pixel, a region outside, a picture above 4096 px a side, or a
                file that is damaged there.
        """
        self.check(region)
        width = max(round(region.width / microns_per_pixel), 1)
        height = max(round(region.height / microns_per_pixel), 1)
        if max(width, height) > MAX_SIDE:
            raise CloverError(
                f"region {region} µm is {width:,} x {height:,} px at {microns_per_pixel:g} µm/px, "
                f"at most {MAX_SIDE:,} a side; ask about {MAX_SIDE * microns_per_pixel:.0f} µm or "
                "less, or go over all of it with --tour"
            )
        left, top = region.x / self.scale.x, region.y / self.scale.y
        right, bottom = region.right / self.scale.x, region.bottom / self.scale.y
        wanted = min(microns_per_pixel / self.scale.x, microns_per_pixel / self.scale.y)
        # From twice as fine a level where there is one: which level it was then does not show.
        level = self._level(wanted / 2)
        here, pixels = self._source.sizes[level], partial(self._source.read, level)
        return self._scaled((left, top, right, bottom), (width, height), here, pixels)

    def resampled(
        self, box: tuple[float, float, float, float], size: tuple[int, int], reduction: float
    ) -> Image.Image:
        """Return a box given in pixels of the finest level, scaled to `size`: for the eye.

        Args:
            box: Left, top, right, bottom; need not be whole pixels.
            size: Width and height of the picture.
            reduction: How many of the finest pixels go into one; chooses the level.
        """
        small = self._small_level(reduction)
        if small is not None:
            return self._scaled(box, size, small.size, small.crop)
        level = self._level(reduction)
        return self._scaled(box, size, self._source.sizes[level], partial(self._source.read, level))

    def _scaled(
        self,
        box: tuple[float, float, float, float],
        size: tuple[int, int],
        here: tuple[int, int],
        pixels: Callable[[tuple[int, int, int, int]], Image.Image],
    ) -> Image.Image:
        """Scale a box, in pixels of the finest level, out of a level of size `here`."""
        full = self.size
        ratio = here[0] / full[0], here[1] / full[1]
        inner = (box[0] * ratio[0], box[1] * ratio[1], box[2] * ratio[0], box[3] * ratio[1])
        inner = (
            min(max(inner[0], 0.0), here[0] - 1.0),
            min(max(inner[1], 0.0), here[1] - 1.0),
            min(inner[2], float(here[0])),
            min(inner[3], float(here[1])),
        )
        outer = (
            max(math.floor(inner[0]) - _MARGIN, 0),
            max(math.floor(inner[1]) - _MARGIN, 0),
            min(math.ceil(inner[2]) + _MARGIN, here[0]),
            min(math.ceil(inner[3]) + _MARGIN, here[1]),
        )
        place = (
            inner[0] - outer[0],
            inner[1] - outer[1],
            inner[2] - outer[0],
            inner[3] - outer[1],
        )
        return pixels(outer).resize(size, Image.Resampling.BICUBIC, box=place)

    def _level(self, reduction: float) -> int:
        """Return the coarsest level that is not coarser than wanted, by a hundredth."""
        full = self.size[0]
        fine = [
            level
            for level, (width, _) in enumerate(self._source.sizes)
            if full / width <= reduction * 1.01
        ]
        return max(fine, default=0)

    def _small_level(self, reduction: float) -> Image.Image | None:
        """Return a made level where the file lacks one that is so coarse."""
        longest = max(self._source.sizes[-1])
        if longest <= 2 * _OVERVIEW:
            return None
        if reduction < max(self.size) / longest * math.ceil(longest / _OVERVIEW):
            return None
        with self._lock:  # two tiles asked for at once make it once
            return self._made_small

    @cached_property
    def _made_small(self) -> Image.Image:
        """The coarsest level averaged down to about 1024 px, read strip by strip."""
        level = len(self._source.sizes) - 1
        width, height = self._source.sizes[level]
        factor = math.ceil(max(width, height) / _OVERVIEW)
        made = Image.new("RGB", (math.ceil(width / factor), math.ceil(height / factor)))
        rows = max(_STRIP // (width * factor), 1) * factor
        for top in range(0, height, rows):
            strip = self._source.read(level, (0, top, width, min(top + rows, height)))
            made.paste(strip.reduce(factor), (0, top // factor))
        return made

    def overview(self, longest: int) -> Image.Image:
        """Return the whole slide, its longer side at most `longest` px. Needs no µm per pixel."""
        width, height = self.size
        factor = max(width, height) / longest
        if factor <= 1:
            return self.resampled((0, 0, width, height), (width, height), 1.0)
        size = max(round(width / factor), 1), max(round(height / factor), 1)
        return self.resampled((0, 0, width, height), size, factor)

    def close(self) -> None:
        """Close the file."""
        self._source.close()

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_slide(
    path: str | Path,
    microns_per_pixel: MicronsPerPixel | None = None,
    *,
    estimate: bool = False,
) -> Slide:
    """Open a slide, a DICOM file or a plain image.

    Args:
        path: The file; of a DICOM slide, any one of its files.
        microns_per_pixel: What the user states; it goes before what the file states.
        estimate: Take what the objective's power usually gives where the file states no size.

    Raises:
        CloverError: no such file, of no known format, damaged, or no power to estimate from.
    """
    path = Path(path)
    slide = Slide(path, source := open_source(path), source.stated)
    return slide.scaled(microns_per_pixel, estimate=estimate)
