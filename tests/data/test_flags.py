"""`clover data check`: captions that repeat, images that are no histology."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from clover.cli import cli
from clover.core.record import Record
from clover.data.check import check_file, not_histology
from clover.vision.pictures import GREY, look


def stained(seed: int, *, chroma: int = 60) -> Image.Image:
    """Return pink noise whose channels lie so far apart."""
    grey = np.random.default_rng(seed).integers(100, 180, (64, 64, 1))
    return Image.fromarray((grey + np.array([chroma, 0, chroma // 2])).astype(np.uint8))


def test_captions_that_repeat_and_flagged_records_are_counted_and_listed(tmp_path: Path) -> None:
    captions = [
        "Colon with crypts",
        "colon  with crypts",
        "Colon, with crypts",
        "Colon with crypts",
    ]
    flags = [{}, {"not_histology": "1.0"}, {"not_histology": 0}, {"is_histology": False}]
    rows = [
        {"id": str(n), "image": f"{n}.png", "caption": caption, **flag}
        for n, (caption, flag) in enumerate(zip(captions, flags, strict=True))
    ]
    for n in range(3):
        stained(n).save(tmp_path / f"{n}.png")
    stained(3).convert("L").save(tmp_path / "3.png")
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "aside.jsonl"
    done = CliRunner().invoke(cli, ["data", "check", str(path), "--out", str(out)])
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert any(line.startswith("2 captions repeat one before, word for word") for line in lines)
    assert "1 records are no histology by their column not_histology" in lines
    assert "1 records are no histology by their column is_histology" in lines
    assert any(line.startswith("1 images without colour") for line in lines)
    listed = [(row["reason"], row["line"]) for row in map(json.loads, out.open())]
    assert listed == [
        ("image without colour", 0),
        ("no histology by its table", 2),
        ("no histology by its table", 4),
    ]


@pytest.mark.parametrize(
    ("extra", "column"),
    [
        ({"not_histology": 1}, "not_histology"),
        ({"Non-Histology": "TRUE"}, "Non-Histology"),
        ({"not_histology": ""}, None),
        ({"not_histology": "0.0", "single_wsi": "1.0"}, None),
        ({"is_histology": "no"}, "is_histology"),
        ({"histology": "adenocarcinoma"}, None),
    ],
)
def test_what_a_table_says_of_histology(extra: dict[str, object], column: str | None) -> None:
    assert not_histology(Record(id="1", **extra)) == column  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["png", "jpg"])
@pytest.mark.parametrize("with_portrait", [True, False])
def test_the_limit_of_colour(kind: str, with_portrait: bool, tmp_path: Path) -> None:
    for chroma, is_grey in ((GREY + 8, False), (GREY - 8, True), (0, True)):
        path = tmp_path / f"{chroma}.{kind}"
        stained(0, chroma=chroma).save(path)
        assert look(path, with_portrait=with_portrait).is_grey == is_grey


def test_a_little_tissue_on_much_glass_has_colour_and_a_stamp_on_a_radiograph_has_not(
    tmp_path: Path,
) -> None:
    glass = Image.new("RGB", (100, 100), "white")
    for share, is_grey in ((15, False), (5, True)):
        picture = glass.copy()
        picture.paste(stained(1).resize((100, share)), (0, 0))
        picture.save(tmp_path / "a.png")
        assert look(tmp_path / "a.png", with_portrait=False).is_grey == is_grey


def test_real_patches_have_colour_and_lose_it_when_made_grey(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "histology"
    if not folder.exists():
        pytest.skip("no ../shared/data/histology beside the project")
    files = sorted(folder.rglob("*.jpg"))[::40]
    assert len(files) > 50
    assert sum(look(file, with_portrait=False).is_grey for file in files) <= len(files) * 0.02
    for file in files[::8]:
        Image.open(file).convert("L").convert("RGB").save(tmp_path / "grey.jpg", quality=60)
        assert look(tmp_path / "grey.jpg", with_portrait=False).is_grey


def test_check_says_nothing_where_nothing_is_amiss(tmp_path: Path) -> None:
    stained(0).save(tmp_path / "0.png")
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"id": "1", "image": "0.png", "caption": "Fat"}) + "\n")
    assert check_file(path).lines() == [
        "1 of 1 images present; 1 pairs of 1 records",
        "captions: 1; words: 1 in the middle, 9 in 10 at most 1, longest 1",
        "licences: none named (1)",
    ]
