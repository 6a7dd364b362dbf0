"""From densities to colours: Beer-Lambert absorption, then one scanner's way with colour.

Every image gets its own dye strength, white balance, exposure, focus and noise. Brightness and
contrast are then drawn anew for each image, whatever the tissue: otherwise white fat and blue
lymph nodes could be told apart by their mean colour alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from clover.phantom.canvas import Canvas
from clover.phantom.case import SIZE, Stain
from clover.phantom.texture import Layer, smooth_noise

Generator = np.random.Generator

# Absorption of red, green and blue light at density 1, by layer. Own values, after the colours of
# haematoxylin (blue-violet), eosin (pink), Schiff's reagent (magenta) and diaminobenzidine (brown).
_ABSORPTION: dict[Stain, dict[str, tuple[float, float, float]]] = {
    "h&e": {
        "nuclei": (0.98, 1.16, 0.52),
        "cytoplasm": (0.08, 0.68, 0.34),
        "collagen": (0.10, 0.52, 0.34),
        "mucin": (0.17, 0.13, 0.06),
        "marker": (0.0, 0.0, 0.0),
    },
    "pas": {
        "nuclei": (1.10, 0.82, 0.28),
        "cytoplasm": (0.16, 0.32, 0.13),
        "collagen": (0.13, 0.46, 0.20),
        "mucin": (0.26, 1.40, 0.60),
        "marker": (0.0, 0.0, 0.0),
    },
    "immunohistochemistry": {
        "nuclei": (1.00, 0.76, 0.36),
        "cytoplasm": (0.13, 0.13, 0.09),
        "collagen": (0.27, 0.25, 0.17),
        "mucin": (0.05, 0.04, 0.02),
        "marker": (0.42, 0.78, 1.10),
    },
}
_LAYERS = ("nuclei", "cytoplasm", "collagen", "mucin", "marker")

# Where each stain's pictures are centred after the scanner: mean and deviation of R, G, B in 0..1.
# Drawn independently of the tissue, so that they tell the stain and nothing else.
_BRIGHTNESS: dict[Stain, tuple[float, float, float]] = {
    "h&e": (0.76, 0.61, 0.75),
    "pas": (0.72, 0.63, 0.79),
    "immunohistochemistry": (0.68, 0.65, 0.66),
}
_CONTRAST: dict[Stain, tuple[float, float, float]] = {
    "h&e": (0.22, 0.20, 0.14),
    "pas": (0.22, 0.20, 0.13),
    "immunohistochemistry": (0.21, 0.20, 0.18),
}
_PULL = 0.65
"""Share of the way from an image's own brightness and contrast to the drawn ones."""


def _optical_density(canvas: Canvas, rng: Generator) -> NDArray[np.float32]:
    """Return absorption [3, SIZE, SIZE] with this slide's dye strengths."""
    table = _ABSORPTION[canvas.case.stain]
    density = np.zeros((3, SIZE, SIZE), dtype=np.float32)
    # A nucleus takes the place of cytoplasm: blue in brown, not blue on brown.
    room = 1 - np.float32(0.8) * np.minimum(canvas.nuclei, 1)
    uneven = room + np.float32(0.07) * smooth_noise(rng, 16.0)
    for name in _LAYERS:
        vector = np.array(table[name])
        if not vector.any():
            continue
        layer: Layer = getattr(canvas, name)
        strength = rng.uniform(0.85, 1.15)
        tint = vector * strength * rng.uniform(0.92, 1.08, 3)
        layer = layer * uneven if name != "nuclei" else layer
        for channel in range(3):
            density[channel] += np.float32(tint[channel]) * layer
    return density


def colour(canvas: Canvas, rng: Generator) -> NDArray[np.uint8]:
    """Return the picture [SIZE, SIZE, 3] of a canvas."""
    image = np.exp(-_optical_density(canvas, rng))
    sigma = rng.uniform(0.35, 0.7)
    for channel in range(3):
        ndimage.gaussian_filter(image[channel], sigma, output=image[channel], truncate=2.5)
    stain = canvas.case.stain
    mean = image.mean(axis=(1, 2))
    deviation = image.std(axis=(1, 2)) + 1e-6
    exposure, contrast = rng.normal(0, 0.035), rng.uniform(0.85, 1.2)
    wanted_mean = np.array(_BRIGHTNESS[stain]) + exposure + rng.normal(0, 0.02, 3)
    wanted_deviation = np.array(_CONTRAST[stain]) * contrast * rng.uniform(0.93, 1.07, 3)
    mean_after = mean + _PULL * (wanted_mean - mean)
    gain = (wanted_deviation / deviation) ** _PULL
    slope_x, slope_y = rng.uniform(-0.025, 0.025, 2)
    ramp = np.linspace(-1, 1, SIZE, dtype=np.float32)
    light = 1 + np.float32(slope_x) * ramp[None, :] + np.float32(slope_y) * ramp[:, None]
    grain = np.float32(rng.uniform(1.0, 2.5)) * smooth_noise(rng, 0.6)
    picture = np.empty((SIZE, SIZE, 3), dtype=np.uint8)
    for channel in range(3):
        offset = mean_after[channel] - gain[channel] * mean[channel]
        plane = image[channel] * np.float32(gain[channel] * 255) + np.float32(offset * 255)
        picture[:, :, channel] = np.clip(plane * light + grain, 0, 255)
    return picture
