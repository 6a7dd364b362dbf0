"""Training and evaluation data that share images, as copies or as themselves, or groups."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, TiffImagePlugin
from scipy.ndimage import gaussian_filter

from clover.core.errors import CloverError
from clover.core.record import Record, write_records
from clover.vision.dataset import ImageSet, load_image_set
from clover.vision.leaks import find_overlap, refuse_leaks
from clover.vision.likeness import Floats, Gallery
from clover.vision.pictures import Picture, look


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


def write_slide(path: Path, seed: int = 1) -> Path:
    """Write 600 x 400 µm of tissue at 1 µm per pixel, as a TIFF with a slide's resolution."""
    noise = np.random.default_rng(seed).normal(size=(400, 600, 3))
    pixels = np.clip(128 + 900 * gaussian_filter(noise, (7, 7, 0)), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[282] = tags[283] = 10_000.0  # pixels a centimetre
    tags[296] = 3
    Image.fromarray(pixels).save(path, tiffinfo=tags)
    return path


def read_named(folder: Path, *names: str, group: str | None = None) -> ImageSet:
    """Return records on images of a folder; regions are read at 1 µm per pixel."""
    records = [Record(id=name, image=name, caption="c", group=group) for name in names]
    write_records(folder / f"{len(list(folder.glob('*.jsonl')))}.jsonl", records)
    newest = folder / f"{len(list(folder.glob('*.jsonl'))) - 1}.jsonl"
    return load_image_set(newest, microns_per_pixel=1.0)


@pytest.mark.parametrize("group", [None, "s"])
def test_regions_of_one_slide_on_both_sides_are_refused_as_such(
    tmp_path: Path, group: str | None
) -> None:
    write_slide(tmp_path / "s.tif")
    train = read_named(tmp_path, "s.tif#0,0,100,100", "s.tif#0,100,100,100", group=group)
    test = read_named(tmp_path, "s.tif#400,200,100,100", group=group)
    found = find_overlap(train, test, cache=tmp_path / "cache")
    assert found.slides == [("s.tif#0,0,100,100", "s.tif#400,200,100,100")]
    assert found.groups == ([group] if group else [])
    with pytest.raises(CloverError) as caught:
        refuse_leaks(train, test, cache=tmp_path / "cache", what="these")
    assert "1 slides (s.tif#400,200,100,100 is of the slide of s.tif#0,0,100,100)" in str(
        caught.value
    )


def test_a_slide_is_known_under_another_name_whole_and_when_it_is_gone(tmp_path: Path) -> None:
    write_slide(tmp_path / "s.tif")
    shutil.copy(tmp_path / "s.tif", tmp_path / "copy.tif")
    train = read_named(tmp_path, "s.tif#0,0,100,100")
    copied = read_named(tmp_path, "copy.tif#400,200,100,100")
    whole = read_named(tmp_path, "copy.tif")
    other = read_named(tmp_path, f"{write_slide(tmp_path / 'o' / 's.tif', 2)}#0,0,100,100")

    def slides(one: ImageSet, two: ImageSet) -> list[tuple[str, str]]:
        return find_overlap(one, two, cache=tmp_path / "cache").slides

    assert slides(train, copied) == [("s.tif#0,0,100,100", "copy.tif#400,200,100,100")]
    assert slides(train, whole) == [("s.tif#0,0,100,100", "copy.tif")]
    assert slides(whole, train) == [("copy.tif", "s.tif#0,0,100,100")]
    assert not find_overlap(train, other, cache=tmp_path / "cache")
    again = read_named(tmp_path, "s.tif#1,1,100,100")
    (tmp_path / "s.tif").unlink()
    assert slides(train, again) == [("s.tif#0,0,100,100", "s.tif#1,1,100,100")]


def test_a_picture_cut_from_a_slide_is_found_by_its_looks(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "s.tif")
    with Image.open(slide) as image:
        image.crop((100, 100, 260, 260)).transpose(Image.Transpose.ROTATE_90).save(
            tmp_path / "patch.png"
        )
    train = read_named(tmp_path, "s.tif#0,240,160,160", "s.tif#100,100,160,160")
    test = read_named(tmp_path, "patch.png")
    found = find_overlap(train, test, cache=tmp_path / "cache")
    assert [pair[:2] for pair in found.pairs] == [("s.tif#100,100,160,160", "patch.png")]


def test_regions_are_told_apart_and_a_file_may_have_a_hash_in_its_name(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "s.tif")
    here, same, there = (
        look(Path(f"{slide}#{place}"), with_portrait=True)
        for place in ("0,0,100,100", "0.0,0,100,100", "50,0,100,100")
    )
    assert here.digest == same.digest != there.digest and here.slide == there.slide
    assert here.portrait is not None and here.problem is None
    tissue(1).save(tmp_path / "a#1.png")
    assert look(tmp_path / "a#1.png", with_portrait=False).problem is None
    for name, problem in [
        (f"{slide}#900,900,100,100", "unreadable region"),
        (f"{slide}#nowhere", "unreadable region"),
        (f"{tmp_path}/none.svs#0,0,100,100", "missing image"),
    ]:
        assert look(Path(name), with_portrait=True).problem == problem


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the images that portraits are made of, in pieces of four."""
    seen: list[Path] = []

    def counted(path: Path, *, with_portrait: bool) -> Picture:
        seen.append(path)
        return look(path, with_portrait=with_portrait)

    monkeypatch.setattr("clover.vision.portraits.look", counted)
    monkeypatch.setattr("clover.vision.portraits.PIECE", 4)
    return seen


def test_a_stopped_check_goes_on_where_it_was(
    write: Callable[..., ImageSet],
    tmp_path: Path,
    looked: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = write("train", {f"t{seed}.png": tissue(seed) for seed in range(20)})
    test = write("test", {"v.png": tissue(100), "copy.png": turned(tissue(7))})
    compared = Gallery.alike
    left = [10]

    def stopping(self: Gallery, one: Floats) -> list[tuple[int, float]]:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return compared(self, one)

    monkeypatch.setattr(Gallery, "alike", stopping)
    with pytest.raises(KeyboardInterrupt):
        find_overlap(train, test, cache=tmp_path / "cache")
    looked.clear()
    found = find_overlap(train, test, cache=tmp_path / "cache")
    assert [pair[:2] for pair in found.pairs] == [("t7.png", "copy.png")]
    assert len(looked) == 20 - 8, "two pieces of four were whole"
    assert left[0] == -12, "what had been compared was compared again"
    assert len(list((tmp_path / "cache" / "portraits").glob("alike-*"))) == 1


def test_bytes_that_are_no_picture_are_looked_at_once(
    write: Callable[..., ImageSet], tmp_path: Path, looked: list[Path]
) -> None:
    write("train", {"a.png": tissue(1), "b.png": tissue(2)})
    (tmp_path / "train" / "b.png").write_bytes(b"no picture")
    train = load_image_set(tmp_path / "train" / "records.jsonl")
    for number in range(2):
        test = write(f"test{number}", {"c.png": tissue(10 + number)})
        assert not find_overlap(train, test, cache=tmp_path / "cache")
    assert len([path for path in looked if path.parent.name == "train"]) == 2


def test_processes_that_check_together_look_at_every_image_once(
    write: Callable[..., ImageSet], tmp_path: Path
) -> None:
    write("train", {f"t{seed}.png": tissue(seed) for seed in range(40)})
    write("test", {"v.png": tissue(100), "copy.png": turned(tissue(7))})
    script = tmp_path / "work.py"
    script.write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "import clover.vision.leaks as leaks, clover.vision.portraits as portraits\n"
        "from clover.vision.dataset import load_image_set\n"
        "here, look, seen = Path(sys.argv[1]), portraits.look, []\n"
        "def slow(path, *, with_portrait):\n"
        "    # Neither goes on until both have begun: however slow one of them starts.\n"
        "    if path.parent.name == 'train':\n"
        "        (here / f'begun-{os.getpid()}').touch()\n"
        "        while len(list(here.glob('begun-*'))) < 2:\n"
        "            time.sleep(0.01)\n"
        "    seen.append(path)\n"
        "    return look(path, with_portrait=with_portrait)\n"
        "portraits.look, portraits.PIECE = slow, 4\n"
        "sets = [load_image_set(here / name / 'records.jsonl') for name in ('train', 'test')]\n"
        "found = leaks.find_overlap(*sets, cache=here / 'cache')\n"
        "print(len(seen), len(found.pairs))\n"
    )
    workers = [
        subprocess.Popen([sys.executable, script, tmp_path], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    results = [[int(n) for n in worker.communicate()[0].split()] for worker in workers]
    assert [pairs for _, pairs in results] == [1, 1]
    assert sum(number for number, _ in results) == 42
    assert all(number for number, _ in results), "one of them did everything"
