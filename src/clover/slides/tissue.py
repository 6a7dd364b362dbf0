"""Where on a slide there is tissue: colourful against the glass.

A mask at about 8 µm a pixel, from the slide's overview: saturation above Otsu's threshold
(Otsu 1979), without pen marks' and dust's crumbs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clover.slides.reader import Slide
from clover.slides.region import Region

_RESOLUTION_UM = 8.0
_LONGEST = 2048
_LEAST_SATURATION = 12.0
"""Of 255. Below it glass is all there is, whatever Otsu splits it into."""
_MOST_SPLIT = 60.0
"""Of 255. A slide full of tissue has no glass to be told from; then this is enough colour."""
_CRUMB_UM2 = 5_000.0
"""Tissue of less than about 70 µm across is dust."""


@dataclass(frozen=True)
class TissueMask:
    """Where tissue is.

    Attributes:
        mask: [height, width] over the whole slide.
        extent: The slide in µm.
    """

    mask: NDArray[np.bool_]
    extent: Region

    @property
    def share(self) -> float:
        """Tissue's share of the slide."""
        return float(self.mask.mean())

    def share_of(self, region: Region) -> float:
        """Return tissue's share of a region, 0 to 1."""
        height, width = self.mask.shape
        left = int(region.x / self.extent.width * width)
        top = int(region.y / self.extent.height * height)
        right = max(int(np.ceil(region.right / self.extent.width * width)), left + 1)
        bottom = max(int(np.ceil(region.bottom / self.extent.height * height)), top + 1)
        part = self.mask[top:bottom, left:right]
        return float(part.mean()) if part.size else 0.0


def find_tissue(slide: Slide) -> TissueMask:
    """Return where a slide has tissue.

    Raises:
        CloverError: the slide does not state its µm per pixel, or cannot be read.
    """
    extent = slide.extent
    longest = max(extent.width, extent.height)
    overview = slide.overview(max(min(round(longest / _RESOLUTION_UM), _LONGEST), 1))
    return TissueMask(tissue_of(overview, pixel_um=longest / max(overview.size)), extent)


def tissue_of(overview: Image.Image, *, pixel_um: float) -> NDArray[np.bool_]:
    """Return the tissue of an overview, [height, width]."""
    from scipy import ndimage

    pixels = np.asarray(overview.convert("RGB"), dtype=np.float32)
    # The spread of the channels: unlike HSV's saturation it is small where all is nearly black.
    saturation = ndimage.median_filter(pixels.max(axis=2) - pixels.min(axis=2), size=3)
    threshold = float(np.clip(otsu(saturation), _LEAST_SATURATION, _MOST_SPLIT))
    mask = ndimage.binary_closing(saturation > threshold, iterations=2, border_value=0)
    mask |= saturation > threshold
    labels, count = ndimage.label(mask)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    large = sizes * pixel_um**2 >= _CRUMB_UM2
    large[0] = False
    found: NDArray[np.bool_] = large[labels]
    return found


def otsu(values: NDArray[np.floating]) -> float:
    """Return the threshold between 0 and 255 that parts values into the two tightest groups.

    Source: Otsu 1979, eq. 18: the largest variance between the groups.
    """
    counts, edges = np.histogram(values, bins=256, range=(0, 256))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = sums / below - (sums[-1] - sums) / above
        between = np.nan_to_num(below * above * apart**2)
    # On a plateau (no value between two peaks) the middle of it.
    best = np.flatnonzero(between >= between.max() * (1 - 1e-9))
    return float(centres[best].mean() + 0.5)
