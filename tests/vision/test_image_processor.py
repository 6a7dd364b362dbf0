"""Image processors: the published pixels, and which operations change nothing."""

from __future__ import annotations

import math

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
    draw_view,
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


GREY = 128


def warp(image: Image.Image, matrix: list[list[float]]) -> np.ndarray:
    """Bilinear warp over a plane that is grey beyond the image, by its definition."""
    pixels = np.asarray(image).astype(float)
    height, width = pixels.shape[:2]

    def at(row: int, column: int) -> np.ndarray:
        inside = 0 <= row < height and 0 <= column < width
        return pixels[row, column] if inside else np.full(3, GREY)

    out = np.empty_like(pixels)
    for y in range(height):
        for x in range(width):
            u, v = np.array(matrix) @ [x, y, 1]
            left, top = math.floor(u), math.floor(v)
            a, b = u - left, v - top
            upper = (1 - a) * at(top, left) + a * at(top, left + 1)
            lower = (1 - a) * at(top + 1, left) + a * at(top + 1, left + 1)
            out[y, x] = (1 - b) * upper + b * lower
    return out


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"])
def test_geometric_operations_move_pixels_as_defined_edges_included(name: str, sign: float) -> None:
    angle = np.radians(sign * 15)
    cos, sin = np.cos(angle), np.sin(angle)
    shear, shift = sign * 0.15, sign * 5
    # x and y of the source of each pixel; Rotate is about (W/2, H/2).
    matrices = {
        "ShearX": [[1, -shear, 0], [0, 1, 0]],
        "ShearY": [[1, 0, 0], [-shear, 1, 0]],
        "TranslateX": [[1, 0, shift], [0, 1, 0]],
        "TranslateY": [[1, 0, 0], [0, 1, shift]],
        "Rotate": [[cos, -sin, 20 - cos * 20 + sin * 15], [sin, cos, 15 - sin * 20 - cos * 15]],
    }
    found = np.asarray(OPERATIONS[name](picture(), sign, 0.5)).astype(float)
    expected = warp(picture(), matrices[name])
    # A place is rounded to 1/32 of a pixel: this picture changes by up to 45 from one to the next.
    assert np.abs(found - expected).max() <= 2.5
    assert np.abs(found - expected).mean() < 0.4
    grey = (expected == GREY).all(axis=-1)
    assert grey.any() and (found[grey] == GREY).all()


def test_every_draw_is_two_operations_with_replacement_each_at_half_chance() -> None:
    names = list(OPERATIONS)
    pairs = set()
    for seed in range(60):
        found = rand_augment(picture(), np.random.default_rng(seed))
        # The same draws, in the words of SPEC 3.3.
        random = np.random.default_rng(seed)
        expected = picture()
        drawn = [names[index] for index in random.choice(10, size=2)]
        pairs.add(drawn[0] == drawn[1])
        for name in drawn:
            if random.random() < 0.5:
                sign = -1.0 if random.random() < 0.5 else 1.0
                expected = OPERATIONS[name](expected, sign, 5 / 10)
        assert np.array_equal(np.asarray(found), np.asarray(expected)), seed
    assert pairs == {True, False}


def test_a_view_is_cropped_resized_and_mirrored_in_this_order() -> None:
    mirrored = set()
    for seed in range(8):
        found = draw_view(picture(), 24, np.random.default_rng(seed))
        random = np.random.default_rng(seed)
        box = crop_box((40, 30), random, scale=(0.5, 1.0))
        # What lies outside a crop has no part in it, not even through the filter.
        alone = Image.fromarray(np.asarray(picture())[box[1] : box[3], box[0] : box[2]])
        expected = np.asarray(alone.resize((24, 24), Image.Resampling.BICUBIC))
        is_mirrored = random.random() < 0.5
        mirrored.add(is_mirrored)
        wanted = expected[:, ::-1] if is_mirrored else expected
        assert np.array_equal(np.asarray(found), wanted), seed
    assert mirrored == {True, False}


def test_autocontrast_and_equalize_are_pillows() -> None:
    for name, reference in (
        ("AutoContrast", ImageOps.autocontrast),
        ("Equalize", ImageOps.equalize),
    ):
        found = apply_operation(name, picture(), np.random.default_rng(0))
        assert np.array_equal(np.asarray(found), np.asarray(reference(picture())))


def test_autocontrast_and_equalize_by_their_definition() -> None:
    pixels = np.asarray(picture())
    stretched = np.asarray(OPERATIONS["AutoContrast"](picture(), 1.0, 0.5))
    equal = np.asarray(OPERATIONS["Equalize"](picture(), 1.0, 0.5))
    for channel in range(3):
        values = pixels[..., channel]
        low, high = int(values.min()), int(values.max())
        scale = 255 / (high - low)
        expected = np.clip(np.trunc(values * scale - low * scale), 0, 255)
        assert np.abs(stretched[..., channel] - expected).max() <= 1
        counts = np.bincount(values.ravel(), minlength=256)
        step = (values.size - counts[values.max()]) // 255
        before = np.concatenate([[0], np.cumsum(counts)[:-1]])
        table = np.clip((step // 2 + before) // step, 0, 255)
        assert np.array_equal(equal[..., channel], table[values])


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
    cropped = processor(picture().crop(box).resize((24, 24), Image.Resampling.BICUBIC))
    found = plain(picture(), random)
    assert torch.equal(found, cropped) or torch.equal(found, cropped.flip(-1))


def test_numpy_normalises_to_the_bits_that_torch_does() -> None:
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    processor = ImageProcessor(16)
    mean, std = (torch.tensor(item).view(3, 1, 1) for item in (processor.mean, processor.std))
    pixels = torch.from_numpy(levels).permute(2, 0, 1).float() / 255
    assert torch.equal(processor(Image.fromarray(levels)), (pixels - mean) / std)
