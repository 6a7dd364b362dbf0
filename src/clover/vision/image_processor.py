"""From an image to the pixels a network was trained on, exactly as published (SPEC, section 3.3).

`ImageProcessor` is what every encoder here uses. `TrainProcessor` makes the random views of
training; RandAugment and its ten operations are written from their definition.

# Paper: with magnitude 5, Brightness and Sharpness have factor 0.5 * 1.8 + 0.1 = 1.0: two of the
# ten operations, like Identity, change nothing (SPEC, section 3.3). Kept: parity is the point.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from clover.core.transparency import rgb_on_white

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_GREY = (128, 128, 128)


@dataclass(frozen=True)
class ImageProcessor:
    """Resize to a square (the aspect ratio is not kept), scale to [0, 1], normalise.

    Attributes:
        size: Pixels a side, S.
        mean: Of each channel, subtracted.
        std: Of each channel, divided by.
    """

    size: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __call__(self, image: Image.Image) -> Tensor:
        """Return [3, S, S], float32 (`blip_image_eval`)."""
        image = rgb_on_white(image)
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return self.normalise(image)

    def normalise(self, image: Image.Image) -> Tensor:
        """Return an RGB image as numbers [3, S, S].

        By numpy, which has no threads of its own: images are read in many threads, and torch would
        give each of them helpers (`core.threads`).
        """
        pixels = np.array(image).astype(np.float32)
        pixels /= np.float32(255)
        pixels -= np.array(self.mean, dtype=np.float32)
        pixels /= np.array(self.std, dtype=np.float32)
        return torch.from_numpy(pixels.transpose(2, 0, 1))


@dataclass(frozen=True)
class TrainProcessor:
    """A random view: crop, flip, and RandAugment where wanted.

    Attributes:
        processor: Size and normalisation.
        scale: Share of the image's area that a crop has.
        has_rand_augment: `blip_image_train` has it, `blip2_image_train` has not.
    """

    processor: ImageProcessor
    scale: tuple[float, float] = (0.5, 1.0)
    has_rand_augment: bool = True

    def __call__(self, image: Image.Image, random: np.random.Generator) -> Tensor:
        """Return one view [3, S, S].

        Args:
            image: Any image.
            random: Decides the view; the same state gives the same view.
        """
        view = draw_view(image, self.processor.size, random, scale=self.scale)
        if self.has_rand_augment:
            view = rand_augment(view, random)
        return self.processor.normalise(view)


def draw_view(
    image: Image.Image,
    size: int,
    random: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.5, 1.0),
) -> Image.Image:
    """Return a random crop of `scale` of the image's area, `size` pixels a side, half mirrored."""
    image = rgb_on_white(image)
    box = crop_box(image.size, random, scale=scale)
    # Cropped first: `resize(box=...)` would let the filter see pixels outside the crop.
    view = image.crop(box).resize((size, size), Image.Resampling.BICUBIC)
    return ImageOps.mirror(view) if random.random() < 0.5 else view


_TURNS = (
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_180,
    Image.Transpose.ROTATE_270,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.TRANSVERSE,
)


def turn_view(image: Image.Image, number: int) -> Image.Image:
    """Return the image mirrored or turned by quarters: tissue has no upper side.

    Args:
        image: Any image.
        number: Which of the seven that differ from the image itself, from 1.
    """
    return rgb_on_white(image).transpose(_TURNS[(number - 1) % len(_TURNS)])


def crop_box(
    size: tuple[int, int],
    random: np.random.Generator,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Draw a crop: area within `scale`, aspect ratio log-uniform within `ratio`.

    After ten draws that do not fit, the largest central crop of an allowed ratio is taken.

    Returns:
        left, upper, right, lower, in pixels.
    """
    width, height = size
    for _ in range(10):
        area = width * height * random.uniform(*scale)
        aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(random.integers(0, width - crop_width + 1))
            upper = int(random.integers(0, height - crop_height + 1))
            return left, upper, left + crop_width, upper + crop_height
    aspect = min(max(width / height, ratio[0]), ratio[1])
    crop_width = min(width, round(height * aspect))
    crop_height = min(height, round(width / aspect))
    left, upper = (width - crop_width) // 2, (height - crop_height) // 2
    return left, upper, left + crop_width, upper + crop_height


def rand_augment(
    image: Image.Image, random: np.random.Generator, *, count: int = 2, magnitude: int = 5
) -> Image.Image:
    """Apply `count` operations drawn with replacement, each with probability 0.5."""
    for name in random.choice(list(OPERATIONS), size=count):
        if random.random() < 0.5:
            image = apply_operation(str(name), image, random, magnitude=magnitude)
    return image


def apply_operation(
    name: str, image: Image.Image, random: np.random.Generator, *, magnitude: int = 5
) -> Image.Image:
    """Apply one operation of RandAugment; the sign of a geometric one is random."""
    sign = -1.0 if random.random() < 0.5 else 1.0
    return OPERATIONS[name](image, sign, magnitude / 10)


def _factor(level: float) -> float:
    """Level in [0, 1] -> enhancement factor in [0.1, 1.9]; 1 changes nothing."""
    return level * 1.8 + 0.1


def _brightness(image: Image.Image, sign: float, level: float) -> Image.Image:
    table = [min(255, int(value * _factor(level))) for value in range(256)]
    return image.point(table * 3)


def _sharpness(image: Image.Image, sign: float, level: float) -> Image.Image:
    """Blend with a 3 x 3 smoothing; the border keeps its pixels."""
    factor = _factor(level)
    if factor == 1.0:
        return image
    pixels = np.asarray(image, dtype=np.float32)
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)))
    height, width = pixels.shape[:2]
    near = sum(padded[y : y + height, x : x + width] for y in range(3) for x in range(3))
    smooth = pixels.copy()
    smooth[1:-1, 1:-1] = ((near + 4 * pixels) / 13)[1:-1, 1:-1]
    blended = smooth + factor * (pixels - smooth)
    return Image.fromarray(np.clip(blended, 0, 255).astype(np.uint8))


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Warp, bilinear, grey where the image does not reach.

    As OpenCV's warpAffine, which the published operations call: a pixel on the edge is blended with
    the grey beyond it (Pillow's `transform` cuts it off: up to 64 of 255 levels away there), and
    places are rounded to 1/32 of a pixel.

    Args:
        image: RGB.
        matrix: Six numbers that take a pixel of the result to its place in the image.
    """
    a, b, c, d, e, f = matrix
    pixels = np.asarray(image, dtype=np.float32)
    height, width = pixels.shape[:2]
    y, x = np.mgrid[0:height, 0:width]
    u = np.round((a * x + b * y + c) * 32) / 32
    v = np.round((d * x + e * y + f) * 32) / 32
    left, top = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
    right_share = (u - left)[..., None].astype(np.float32)
    lower_share = (v - top)[..., None].astype(np.float32)
    padded = np.full((height + 4, width + 4, 3), _GREY, dtype=np.float32)
    padded[2:-2, 2:-2] = pixels

    def at(row: Any, column: Any) -> Any:
        return padded[np.clip(row + 2, 0, height + 3), np.clip(column + 2, 0, width + 3)]

    upper = at(top, left) * (1 - right_share) + at(top, left + 1) * right_share
    lower = at(top + 1, left) * (1 - right_share) + at(top + 1, left + 1) * right_share
    blended = upper * (1 - lower_share) + lower * lower_share
    return Image.fromarray(np.round(blended).astype(np.uint8))


def _shear_x(image: Image.Image, sign: float, level: float) -> Image.Image:
    return _affine(image, (1, -sign * 0.3 * level, 0, 0, 1, 0))


def _shear_y(image: Image.Image, sign: float, level: float) -> Image.Image:
    return _affine(image, (1, 0, 0, -sign * 0.3 * level, 1, 0))


def _translate_x(image: Image.Image, sign: float, level: float) -> Image.Image:
    return _affine(image, (1, 0, sign * 10 * level, 0, 1, 0))


def _translate_y(image: Image.Image, sign: float, level: float) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, sign * 10 * level))


def _rotate(image: Image.Image, sign: float, level: float) -> Image.Image:
    angle = math.radians(sign * 30 * level)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = image.width / 2, image.height / 2
    # Anticlockwise about the middle: the result's pixel is looked up clockwise.
    return _affine(image, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))


Operation = Callable[[Image.Image, float, float], Image.Image]
"""(image, sign, level in [0, 1]) -> image."""

OPERATIONS: dict[str, Operation] = {
    "Identity": lambda image, sign, level: image,
    "AutoContrast": lambda image, sign, level: ImageOps.autocontrast(image),
    "Brightness": _brightness,
    "Sharpness": _sharpness,
    "Equalize": lambda image, sign, level: ImageOps.equalize(image),
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
    "Rotate": _rotate,
}
"""The ten operations of `blip_image_train`."""
