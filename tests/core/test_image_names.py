"""Records that go to another folder name the same images from there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from clover.core.image_names import image_move
from clover.core.record import Record


def record(image: str, group: str | None = None) -> Record:
    return Record(id="1", image=image, group=group)


def moved(tmp_path: Path, out: str, *names: str, source: str = "own/c.jsonl") -> list[str | None]:
    records = [record(name) for name in names]
    move = image_move(records, source=tmp_path / source, out=tmp_path / out)
    assert move is not None
    return [move(item).image for item in records]


@pytest.fixture(autouse=True)
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "own" / "images" / "1.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    return path


def test_names_lead_to_the_same_files_from_the_new_folder(tmp_path: Path, picture: Path) -> None:
    absolute = str(picture)
    names = ["images/1.png", "images/absent.png", absolute]
    expected = ["../own/images/1.png", "../own/images/absent.png", absolute]
    assert moved(tmp_path, "new/t.jsonl", *names) == expected  # also of a folder not made yet
    assert moved(tmp_path, "t.jsonl", *names)[0] == "own/images/1.png"
    assert moved(tmp_path, "own/images/t.jsonl", *names)[0] == "1.png"
    assert moved(tmp_path, "own/t.jsonl", "./images/1.png", absolute) == [
        "./images/1.png",
        absolute,
    ]


def test_a_region_stays_behind_its_slide_and_groups_that_are_images_follow(tmp_path: Path) -> None:
    region = "images/1.png#0,0,20.5,20"
    image, slide, patient = (
        record(region, group) for group in (region, "images/1.png", "patient 7")
    )
    move = image_move([image], source=tmp_path / "own/c.jsonl", out=tmp_path / "t.jsonl")
    assert move is not None
    assert move(image).image == move(image).group == f"own/{region}"
    assert (move(slide).group, move(patient).group) == ("own/images/1.png", "patient 7")


def test_names_that_start_from_another_folder_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    records = [record("own/images/1.png"), record(""), Record(id="2")]
    out = tmp_path / "t.jsonl"
    assert image_move(records, source=tmp_path / "lists/c.jsonl", out=out) is None


def test_where_thousands_lie_elsewhere_no_more_are_looked_for(tmp_path: Path) -> None:
    read = 0

    def absent() -> Iterator[Record]:
        nonlocal read
        for read in range(100_000):
            yield record(f"{read // 2}.png")

    assert image_move(absent(), source=tmp_path / "own/c.jsonl", out=tmp_path / "t.jsonl") is None
    assert 4000 < read < 10_000


def test_the_way_leads_out_of_the_folder_behind_a_link(tmp_path: Path, picture: Path) -> None:
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    (found,) = moved(tmp_path, "link/t.jsonl", "images/1.png")
    assert (tmp_path / "link" / str(found)).samefile(picture)
    # And a folder that is a link is called as it is called.
    (tmp_path / "linked").symlink_to(tmp_path / "own")
    names = moved(tmp_path, "t.jsonl", "images/1.png", source="linked/c.jsonl")
    assert names == ["linked/images/1.png"]
