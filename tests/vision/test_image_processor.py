"""Image processors: the published pixels, and which operations change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from clover.vision.image_processor import (
    CLIP_MEAN,
    CLIP_STD,
    OPERATIONS,
    ImageProcessor,
    TrainProcessor,
    apply_operation,
    crop_box,
    rand_augment,
)

NO_OPERATION = {"Identity", "Brightness", "Sharpness"}


def picture(width: int = 40, height: int = 30) -> Image.Image:
    random = np.random.default_rng(0)
    coarse = random.integers(30, 221, (6, 8, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def test_evaluation_resizes_to_a_square_and_normalises() -> None:
    found = ImageProcessor(24)(picture())
    resized = np.asarray(picture().resize((24, 24), Image.Resampling.BICUBIC)) / 255
    for channel in range(3):
        expected = (resized[..., channel] - CLIP_MEAN[channel]) / CLIP_STD[channel]
        np.testing.assert_allclose(found[channel].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_with_magnitude_5_three_of_ten_operations_change_nothing(name: str) -> None:
    before = np.asarray(picture())
    after = np.asarray(apply_operation(name, picture(), np.random.default_rng(1)))
    assert np.array_equal(before, after) == (name in NO_OPERATION)


def test_with_another_magnitude_they_do() -> None:
    before = np.asarray(picture())
    for name in ("Brightness", "Sharpness"):
        after = apply_operation(name, picture(), np.random.default_rng(1), magnitude=9)
        assert not np.array_equal(before, np.asarray(after))


def warp(image: Image.Image, matrix: list[list[float]]) -> np.ndarray:
    """Bilinear warp with grey outside, by its definition, pixel by pixel."""
    pixels = np.asarray(image).astype(float)
    height, width = pixels.shape[:2]
    out = np.full_like(pixels, np.nan)
    for y in range(height):
        for x in range(width):
            u, v = np.array(matrix) @ [x, y, 1]
            if not (0 <= u <= width - 1 and 0 <= v <= height - 1):
                continue
            left, top = min(int(u), width - 2), min(int(v), height - 2)
            a, b = u - left, v - top
            near = pixels[top : top + 2, left : left + 2]
            out[y, x] = (1 - b) * ((1 - a) * near[0, 0] + a * near[0, 1]) + b * (
                (1 - a) * near[1, 0] + a * near[1, 1]
            )
    return out


@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"])
def test_geometric_operations_move_pixels_as_defined(name: str) -> None:
    angle = np.radians(15)
    cos, sin = np.cos(angle), np.sin(angle)
    # x and y of the source of each pixel, for the positive sign; Rotate is about (W/2, H/2).
    matrices = {
        "ShearX": [[1, -0.15, 0], [0, 1, 0]],
        "ShearY": [[1, 0, 0], [-0.15, 1, 0]],
        "TranslateX": [[1, 0, 5], [0, 1, 0]],
        "TranslateY": [[1, 0, 0], [0, 1, 5]],
        "Rotate": [[cos, -sin, 20 - cos * 20 + sin * 15], [sin, cos, 15 - sin * 20 - cos * 15]],
    }
    found = np.asarray(OPERATIONS[name](picture(), 1.0, 0.5)).astype(float)
    expected = warp(picture(), matrices[name])
    inside = ~np.isnan(expected)
    assert inside.mean() > 0.6
    assert np.abs(found - expected)[inside].max() <= 1.5  # rounding
    # Far outside it is grey.
    far = OPERATIONS["TranslateX"](picture(), 1.0, 0.5)
    assert np.asarray(far)[:, -3:].tolist() == [[[128] * 3] * 3] * 30


def test_autocontrast_and_equalize_are_pillows() -> None:
    for name, reference in (
        ("AutoContrast", ImageOps.autocontrast),
        ("Equalize", ImageOps.equalize),
    ):
        found = apply_operation(name, picture(), np.random.default_rng(0))
        assert np.array_equal(np.asarray(found), np.asarray(reference(picture())))


def test_an_operation_is_drawn_uniformly_and_applied_half_the_time() -> None:
    random = np.random.default_rng(0)
    count = 400
    changed = sum(
        not np.array_equal(np.asarray(picture()), np.asarray(rand_augment(picture(), random)))
        for _ in range(count)
    )
    # Each of two draws changes something with probability 0.5 * 7/10.
    expected = 1 - (1 - 0.35) ** 2
    assert abs(changed / count - expected) < 4 * (expected * (1 - expected) / count) ** 0.5


def test_crops_stay_inside_and_have_the_share_and_ratio_asked_for() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        left, upper, right, lower = crop_box((400, 300), random, scale=(0.5, 1.0))
        assert 0 <= left < right <= 400 and 0 <= upper < lower <= 300
        width, height = right - left, lower - upper
        assert 0.49 <= width * height / (400 * 300) <= 1.0
        assert 0.74 <= width / height <= 1.34
    # A strip has no such crop: the largest of the nearest ratio, in the middle.
    assert crop_box((900, 30), random, scale=(0.5, 1.0)) == (430, 0, 470, 30)


def test_a_view_is_repeated_by_its_seed_and_blip2_has_no_randaugment() -> None:
    processor = ImageProcessor(24)
    published = TrainProcessor(processor)
    views = [published(picture(), np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])
    plain = TrainProcessor(processor, has_rand_augment=False)
    random = np.random.default_rng(7)
    box = crop_box(picture().size, np.random.default_rng(7), scale=(0.5, 1.0))
    cropped = processor(picture().resize((24, 24), Image.Resampling.BICUBIC, box=box))
    found = plain(picture(), random)
    assert torch.equal(found, cropped) or torch.equal(found, cropped.flip(-1))
