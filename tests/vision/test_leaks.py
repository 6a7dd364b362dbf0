"""Training and evaluation data that share images, as copies or as themselves, or groups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy.ndimage import gaussian_filter

from clover.core.errors import CloverError
from clover.core.record import Record, write_records
from clover.vision.dataset import ImageSet, load_image_set
from clover.vision.leaks import find_overlap, refuse_leaks


def tissue(seed: int) -> Image.Image:
    """Return smooth random blobs, each seed its own picture."""
    noise = np.random.default_rng(seed).normal(size=(160, 160, 3))
    smooth = gaussian_filter(noise, (7, 7, 0))
    return Image.fromarray(np.clip(128 + 900 * smooth, 0, 255).astype(np.uint8))


def turned(picture: Image.Image) -> Image.Image:
    return picture.transpose(Image.Transpose.ROTATE_90)


def mirrored(picture: Image.Image) -> Image.Image:
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def brighter(picture: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(picture).enhance(1.15)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., ImageSet]:
    def make(name: str, pictures: dict[str, Image.Image], **more: str) -> ImageSet:
        folder = tmp_path / name
        folder.mkdir()
        for file, picture in pictures.items():
            picture.save(folder / file)
        records = [
            Record(id=file, image=file, caption="c", group=more.get(file.partition(".")[0]))
            for file in pictures
        ]
        write_records(folder / "records.jsonl", records)
        return load_image_set(folder / "records.jsonl")

    return make


@pytest.mark.parametrize("change", [turned, mirrored, brighter])
def test_an_augmented_copy_is_found_and_other_pictures_are_not(
    write: Callable[..., ImageSet], tmp_path: Path, change: Callable[[Image.Image], Image.Image]
) -> None:
    train = write("train", {f"t{seed}.png": tissue(seed) for seed in range(40)})
    other = {f"v{seed}.png": tissue(seed) for seed in range(100, 110)}
    test = write("test", {**other, "copy.png": change(tissue(7))})
    found = find_overlap(train, test, cache=tmp_path)
    assert [(mine, theirs) for mine, theirs, _ in found.pairs] == [("t7.png", "copy.png")]
    assert found.pairs[0][2].startswith("alike ")
    # The finding is kept: images that are gone by now are not opened again.
    for file in (tmp_path / "train").glob("*.png"):
        file.unlink()
    assert find_overlap(train, test, cache=tmp_path) == found


def test_the_same_bytes_and_shared_groups_are_refused_by_name(
    write: Callable[..., ImageSet], tmp_path: Path
) -> None:
    train = write("train", {"a.png": tissue(1), "b.png": tissue(2)}, b="patient 7")
    test = write("test", {"c.png": tissue(1), "d.png": tissue(3)}, d="patient 7")
    with pytest.raises(CloverError) as caught:
        refuse_leaks(train, test, cache=tmp_path, what="these")
    said = str(caught.value)
    assert "1 evaluation images (c.png is a.png: same bytes)" in said
    assert "1 groups (patient 7)" in said and "--allow-leaks" in said


def test_a_group_that_is_only_the_images_name_is_none(
    write: Callable[..., ImageSet], tmp_path: Path
) -> None:
    """Two sets that both number their images from 0 share no patient."""
    train = write("train", {"000.png": tissue(1)}, **{"000": "000"})
    test = write("test", {"000.png": tissue(2)}, **{"000": "000"})
    assert not find_overlap(train, test, cache=tmp_path)
