"""Every record is given its own picture, or none: names in folders, zips and rows."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clover.data.importer import Summary, import_file


def table(path: Path, *names: str) -> Path:
    rows = [{"id": f"r{n}", "image": name, "caption": name} for n, name in enumerate(names)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def files(root: Path, *names: str) -> Path:
    """Write files that hold their own names."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{root.name}/{name}")
    return root


def packed(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, f"{path.name}/{name}")
    return path


def pictures(source: Path, *roots: Path, out: str = "o.jsonl") -> tuple[dict[str, str], Summary]:
    """Import, and return what the picture of each record holds by the name it had."""
    target = source.with_name(out)
    summary = import_file("records", source, out=target, images=roots)
    rows = [json.loads(line) for line in target.open()]
    places = {row["caption"]: target.parent / row["image"] for row in rows}
    return {c: p.read_text() if p.is_file() else "none" for c, p in places.items()}, summary


def aside(source: Path, out: str = "o.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in source.with_name(f"{out}.rejected.jsonl").open()]


def test_a_zip_with_a_folder_around_all_gives_each_record_its_own(tmp_path: Path) -> None:
    root = packed(tmp_path / "z.zip", "dataset/a/1.png", "dataset/b/1.png", "dataset/b/2.png")
    found, summary = pictures(table(tmp_path / "t.jsonl", "a/1.png", "b\\1.png", "2.png"), root)
    assert found == {
        "a/1.png": "z.zip/dataset/a/1.png",
        "b\\1.png": "z.zip/dataset/b/1.png",
        "2.png": "z.zip/dataset/b/2.png",
    }
    assert not summary.rejected and "3 of 3 images found" in summary.lines()


def test_a_whole_name_in_any_root_comes_before_a_bare_one(tmp_path: Path) -> None:
    first, second = files(tmp_path / "r1", "1.png"), files(tmp_path / "r2", "val/1.png")
    found, _ = pictures(table(tmp_path / "t.jsonl", "val/1.png", "1.png"), first, second)
    assert found == {"val/1.png": "r2/val/1.png", "1.png": "r1/1.png"}
    third = packed(tmp_path / "z.zip", "deep/val/1.png")
    found, _ = pictures(table(tmp_path / "t.jsonl", "val/1.png"), first, third)
    assert found == {"val/1.png": "z.zip/deep/val/1.png"}
    longer = table(tmp_path / "t.jsonl", "C:\\data\\val\\1.png")
    assert set(pictures(longer, first, second)[0].values()) == {"r2/val/1.png"}


def test_a_name_that_fits_several_pictures_is_set_aside_by_name(tmp_path: Path) -> None:
    root = packed(tmp_path / "z.zip", "x/a/1.png", "y/a/1.png", "x/2.png")
    source = table(tmp_path / "t.jsonl", "1.png", "a/1.png", "2.png", "gone.png")
    found, summary = pictures(source, root)
    assert found == {"2.png": "z.zip/x/2.png", "gone.png": "none"}
    assert summary.rejected == {"ambiguous image name": 2}
    assert "2 set aside (2 ambiguous image name)" in summary.lines()[-1]
    (first, second) = aside(source)
    assert (first["line"], first["content"]["image"]) == (1, "1.png")
    assert [place.rsplit("/z.zip: ", 1)[-1] for place in second["content"]["could_be"]] == [
        "x/a/1.png",
        "y/a/1.png",
    ]


def test_copies_of_one_picture_are_not_ambiguous(tmp_path: Path) -> None:
    root = tmp_path / "z.zip"
    with zipfile.ZipFile(root, "w") as archive:
        for name in ("x/1.png", "y/1.png"):
            archive.writestr(name, "the same")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "1.png").write_text("the same")
    found, _ = pictures(table(tmp_path / "t.jsonl", "old/1.png"), root, tmp_path / "r")
    assert found == {"old/1.png": "the same"}


@pytest.mark.parametrize("order", [1, -1])
def test_a_picture_is_no_stand_in_for_anothers_of_the_same_last_name(
    order: int, tmp_path: Path
) -> None:
    """The zip holds one slide of two; which record comes first does not matter."""
    root = packed(tmp_path / "z.zip", "all/slide_1/7.png", "all/slide_1/8.png")
    names = ["slide_1/7.png", "slide_2/7.png", "other/8.png"][::order]
    source = table(tmp_path / "t.jsonl", *names)
    found, summary = pictures(source, root)
    assert found == {
        "slide_1/7.png": "z.zip/all/slide_1/7.png",
        "other/8.png": "z.zip/all/slide_1/8.png",
    }
    assert summary.rejected == {"ambiguous image name": 1}
    assert aside(source)[0]["content"]["image"] == "slide_2/7.png"


def test_a_flat_folder_of_two_names_is_given_to_neither(tmp_path: Path) -> None:
    root = files(tmp_path / "flat", "1.png", "2.png")
    found, summary = pictures(table(tmp_path / "t.jsonl", "a/1.png", "b/1.png", "a/2.png"), root)
    assert found == {"a/2.png": "flat/2.png"}
    assert summary.rejected == {"ambiguous image name": 2} and summary.num_records == 1


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("packs", [files, packed])
def test_names_from_other_machines_that_end_with_the_whole_path_are_one_picture(
    packs: Callable[..., Path], order: int, tmp_path: Path
) -> None:
    root = packs(tmp_path / "r.zip", "images/0.png")
    names = ["/mnt/a/images/0.png", "images/0.png", "C:\\x\\images\\0.png", "/home/b/images/0.png"]
    for chosen in (names[::order], [names[0], names[3]][::order]):
        found, summary = pictures(table(tmp_path / "t.jsonl", *chosen), root)
        assert found == dict.fromkeys(chosen, "r.zip/images/0.png") and not summary.rejected
    # Another folder's is still no stand-in, and a part of a folder's name is another folder.
    chosen = ["/mnt/a/images/0.png", "/mnt/other/0.png", "/mnt/my-images/0.png"][::order]
    found, _ = pictures(table(tmp_path / "t.jsonl", *chosen), root)
    assert found.pop("/mnt/a/images/0.png") == "r.zip/images/0.png"
    assert set(found.values()) <= {"none"}


def embedded(path: Path, *cells: tuple[str | None, bytes]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    rows = [
        {"id": f"r{n}", "image": {"bytes": data, "path": name}, "caption": f"{name} {data!r}"}
        for n, (name, data) in enumerate(cells)
    ]
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_pictures_in_rows_that_share_a_name_stay_apart(tmp_path: Path) -> None:
    cells = [
        ("a/1.bmp", b"first"),
        ("b/1.bmp", b"other"),  # of equal size
        ("c/1.bmp", b"a longer one"),
        ("d\\1.bmp", b"first"),
        ("2.bmp", b"2"),
    ]
    source = embedded(tmp_path / "t.parquet", *cells)
    for _ in range(2):  # the second time all of them are there
        found, summary = pictures(source)
        assert found == {f"{name} {data!r}": data.decode() for name, data in cells}
        assert not summary.rejected
        assert len(list((tmp_path / "o-images").iterdir())) == 4
    assert (tmp_path / "o-images" / "1.bmp").read_bytes() == b"first"


def test_a_second_import_leaves_the_first_ones_pictures(tmp_path: Path) -> None:
    kinds = {"train": ("1.png", b"trained"), "val": ("1.png", b"judged!")}
    for kind, cell in kinds.items():
        source = embedded(tmp_path / f"{kind}.parquet", cell)
        pictures(source, out=f"p.{kind}.jsonl")
    for kind, (name, data) in kinds.items():
        assert (tmp_path / f"p.{kind}-images" / name).read_bytes() == data
    later = packed(tmp_path / "z.zip", "1.png")
    pictures(table(tmp_path / "t.jsonl", "1.png"), later, out="p.train.jsonl")
    assert (tmp_path / "p.train-images" / "1.png").read_bytes() == b"trained"
    (row,) = [json.loads(line) for line in (tmp_path / "p.train.jsonl").open()]
    assert (tmp_path / row["image"]).read_text() == "z.zip/1.png"
