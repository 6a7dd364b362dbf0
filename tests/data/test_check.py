"""`clover data check`: what a file holds, what is wrong with it, what two files share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance, TiffImagePlugin

from clover.cli import main
from clover.core.errors import CloverError
from clover.data.check import check_file


def tissue(seed: int, side: int = 96) -> Image.Image:
    """Return blobs of several sizes: unlike any other seed's, and not symmetric."""
    random = np.random.default_rng(seed)
    total = np.zeros((side, side, 3))
    for cells in (6, 12, 24):
        grid = Image.fromarray(random.integers(0, 255, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC), dtype=float)
    return Image.fromarray((total / 3).astype(np.uint8))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed in range(3):
        tissue(seed).save(tmp_path / f"{seed}.png")
    (tmp_path / "twin.png").write_bytes((tmp_path / "0.png").read_bytes())
    (tmp_path / "torn.png").write_bytes((tmp_path / "1.png").read_bytes()[:3000])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not an image")
    return tmp_path


def test_coverage_broken_and_duplicate_images_are_counted_and_listed(folder: Path) -> None:
    names = ["0.png", "0.png", "1.png", "twin.png", "torn.png", "empty.png", "text.jpg", "no.png"]
    rows = [
        {"id": f"r{n}", "image": name, "caption": "a b c" if n else "one " * 40, "licence": "CC0"}
        for n, name in enumerate(names)
    ]
    path = write(folder / "t.jsonl", [*rows, {"id": "r1", "image": "2.png", "caption": "again"}])
    with path.open("a") as handle:
        handle.write("\nnot json\n")
    out = folder / "aside.jsonl"
    found = check_file(path, out=out)
    assert found.lines() == [
        "3 of 7 images present; 4 pairs of 8 records",
        "2 broken images",
        "1 empty images",
        "1 missing images",
        "1 images have the bytes of another",
        "1 lines set aside: duplicate id",
        "1 lines set aside: not a JSON object",
        "captions: 8; words: 3 in the middle, 9 in 10 at most 40, longest 40",
        "6 captions repeat one before, word for word: false negatives of each other in stage 1 "
        "(align.ignore_duplicates)",
        "licences: CC0 (8)",
    ]
    listed = [(row["reason"], row["content"]) for row in rows_of(out)]
    assert ("duplicate image", {"image": "twin.png", "other": "0.png"}) in listed
    assert {c["id"]: why for why, c in listed if "image" in why and "id" in c} == {
        "r4": "broken image",
        "r5": "empty image",
        "r6": "broken image",
        "r7": "missing image",
    }
    assert [row["line"] for row in rows_of(out) if row["reason"] == "missing image"] == [8]


def test_what_a_table_lacks_is_said_with_the_nearest_column(folder: Path) -> None:
    path = folder / "t.csv"
    path.write_text("filename;captoin\n0.png;fat\n1.png;bone\n")
    lines = check_file(path).lines()
    assert lines[0] == "2 of 2 images present; 2 pairs of 2 records"
    assert lines[1] == "nothing to train on: neither a caption nor a question with its answer"
    assert "no 'caption' column (found: image, captoin); did you mean 'captoin'?" in lines[2]
    path.write_text("picture;Caption\n0.png;fat\n")
    lines = check_file(path).lines()
    assert lines[1].startswith("no images: no 'image' column (found: caption, picture)")
    path.write_text("Image;Question;Answer\n0.png;Fat?;yes\n")
    assert not any("nothing" in line or "column" in line for line in check_file(path).lines())
    path.write_text("bild;befund\n0.png;fat\n")
    with pytest.raises(CloverError, match=r"no column that is known \(found: bild, befund\)"):
        check_file(path)


def test_windows_paths_and_windows_letters_are_told(folder: Path) -> None:
    (folder / "img").mkdir()
    (folder / "0.png").rename(folder / "img" / "0.png")
    path = folder / "t.csv"
    path.write_bytes("image,caption\nimg\\0.png,größer\nimg\\9.png,fat\n".encode("cp1252"))
    lines = check_file(path).lines()
    assert lines[:2] == ["0 of 2 images present; 0 pairs of 2 records", "2 missing images"]
    assert lines[2].startswith("1 of the missing are there with / for \\: clover data import")
    assert "1 lines are not UTF-8 and were read as Windows-1252 (first: t.csv line 2)" in lines[3]


def test_balance_licences_and_straddling_groups(folder: Path) -> None:
    answers = ["yes", "Yes.", "no", "it is"]
    rows = [
        {
            "id": str(n),
            "image": "0.png",
            "question": "Is it?",
            "answer": answer,
            "answer_type": "closed",
            "split": "train" if n else "test",
            "group": "slide 7" if n < 2 else "slide 8",
        }
        for n, answer in enumerate(answers)
    ]
    out = folder / "aside.jsonl"
    found = check_file(write(folder / "t.jsonl", rows), out=out)
    assert "closed answers: 2 yes, 1 no, 1 neither; yes 66.7 %" in found.lines()
    assert "licences: none named (4)" in found.lines()
    assert "1 groups straddle splits: slide 7" in found.lines()
    assert [row["content"]["id"] for row in rows_of(out)] == ["0", "1"]


def _copies(image: Image.Image) -> dict[str, Image.Image]:
    side = image.width
    crop = image.crop((side * 0.06, side * 0.06, side * 0.94, side * 0.94))
    turns = {turn.name: image.transpose(turn) for turn in Image.Transpose}
    return turns | {
        "cropped": crop.resize((side, side)),
        "bright": ImageEnhance.Brightness(image).enhance(1.2),
        "flat": ImageEnhance.Contrast(image).enhance(0.6),
        "larger": image.resize((2 * side, 2 * side)),
        "grey": image.convert("L"),
        "all": ImageEnhance.Brightness(crop.transpose(Image.Transpose.TRANSVERSE)).enhance(0.8),
    }


def test_every_augmented_copy_is_found_and_nothing_else(folder: Path) -> None:
    copies = _copies(tissue(0))
    for name, copy in copies.items():
        copy.save(folder / f"{name}.jpg", quality=80)
    for seed in range(10, 30):
        tissue(seed).save(folder / f"other{seed}.png")
    test = [*(f"other{seed}.png" for seed in range(10, 20)), "0.png"]
    train = [*(f"other{seed}.png" for seed in range(20, 30)), "1.png", "twin.png"]
    train += [f"{name}.jpg" for name in copies]
    first, second = (
        write(
            folder / f"{kind}.jsonl",
            [{"id": name, "image": name, "caption": "x"} for name in names],
        )
        for kind, names in (("train", train), ("test", test))
    )
    out = folder / "leaks.jsonl"
    found = check_file(first, against=second, out=out)
    assert {(leak.image, leak.other) for leak in found.leaks} == {
        ("twin.png", "0.png"),
        *((f"{name}.jpg", "0.png") for name in copies),
    }
    assert [leak.image for leak in found.leaks if leak.likeness is None] == ["twin.png"]
    listed = [row["content"] for row in rows_of(out) if row["reason"] == "leak"]
    assert len(listed) == 1 + len(copies)
    assert listed[0] == {"image": "twin.png", "other": "0.png", "how": "same bytes"}


def test_blank_images_are_like_nothing(folder: Path) -> None:
    Image.new("RGB", (90, 90), (250, 250, 250)).save(folder / "white.png")
    Image.new("RGB", (90, 90), (120, 120, 120)).save(folder / "grey.png")
    first = write(folder / "a.jsonl", [{"id": "a", "image": "white.png", "caption": "x"}])
    second = write(folder / "b.jsonl", [{"id": "b", "image": "grey.png", "caption": "x"}])
    assert not check_file(first, against=second).leaks


@pytest.mark.parametrize(
    ("image", "group", "code"), [("2.png", None, 0), ("twin.png", None, 1), ("2.png", "g", 1)]
)
def test_strict_exits_1_when_anything_is_shared(
    image: str, group: str | None, code: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def row(name: str) -> dict[str, Any]:
        return {"id": name, "image": name, "caption": "x", "group": group}

    first = write(folder / "a.jsonl", [row("0.png")])
    second = write(folder / "b.jsonl", [row(image)])
    for extra, expected in (([], 0), (["--strict"], code)):
        with pytest.raises(SystemExit) as stop:
            main(["data", "check", str(first), "--against", str(second), *extra])
        assert stop.value.code == expected
    assert "groups in both" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.jsonl"], "no file none.jsonl"),
        (["t.jsonl", "--images", "nowhere"], "no folder nowhere"),
        (["t.jsonl", "--strict"], "--against"),
        (["t.jsonl", "--out", "t.jsonl"], "would overwrite t.jsonl"),
        (["t.jsonl", "--against", "none.jsonl"], "no file none.jsonl"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    words: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    write(folder / "t.jsonl", [{"id": "a", "image": "0.png", "caption": "x"}])
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", *arguments])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and words in said and said.count("\n") == 1


def _forms(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Path]:
    """Write the same rows in every form that training reads, beside their images."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    write(folder / "t.jsonl", rows)
    (folder / "t.json").write_text(json.dumps(rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "t.parquet")
    for kind in ("lines", "parquets"):
        (folder / kind).mkdir()
    for part, of_part in enumerate((rows[:2], rows[2:])):
        write(folder / "lines" / f"{part}.jsonl", of_part)
        table = pyarrow.Table.from_pylist(of_part)
        parquet.write_table(table, folder / "parquets" / f"{part}.parquet")
    return {name: folder / name for name in ("t.jsonl", "t.json", "t.parquet", "lines", "parquets")}


def test_every_form_that_training_reads_is_looked_over_alike(folder: Path) -> None:
    names = ["0.png", "1.png", "twin.png", "no.png"]
    rows = [{"id": f"r{n}", "image": name, "caption": "a b"} for n, name in enumerate(names)]
    rows[3]["id"] = "r0"
    second = [{"id": "s0", "image": "0.png", "caption": "x", "group": "g"}] * 3
    other = folder / "other"
    other.mkdir()
    theirs = _forms(other, second)
    said = []
    for name, path in _forms(folder, rows).items():
        out = folder / f"{name}.aside.jsonl"
        found = check_file(
            path,
            images=folder,
            against=theirs[name],
            against_images=folder,
            out=out,
        )
        assert found.num_records == 3 and found.num_pairs == 3, name
        assert len(found.leaks) == 2, name
        assert found.rejected == {"duplicate id": 1}, name
        (repeated,) = [row for row in rows_of(out) if row["reason"] == "duplicate id"]
        said.append((Path(repeated["source"]).name, repeated["line"]))
    assert said == [
        ("t.jsonl", 4),
        ("t.json", 4),
        ("t.parquet", 4),
        ("1.jsonl", 2),
        ("1.parquet", 2),
    ]


def test_images_of_a_folder_of_shards_lie_in_it(folder: Path) -> None:
    (folder / "shards").mkdir()
    tissue(0).save(folder / "shards" / "0.png")
    write(folder / "shards" / "a.jsonl", [{"id": "a", "image": "0.png", "caption": "x"}])
    assert check_file(folder / "shards").num_pairs == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "holds no file of records"),
        ({"a.jsonl": "7\n[]\n"}, "holds no usable record: 2 not a JSON object"),
        ({"a.jsonl": "7\n", "b.parquet": ""}, "holds both JSON Lines and Parquet"),
        ({"b.parquet": "no"}, "is not readable Parquet"),
    ],
)
def test_a_folder_without_records_is_one_line(
    content: dict[str, str], words: str, tmp_path: Path
) -> None:
    if any(name.endswith("parquet") for name in content):
        pytest.importorskip("pyarrow")
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CloverError, match=words):
        check_file(tmp_path)


def test_a_list_among_the_shards_is_refused(folder: Path) -> None:
    shards = folder / "shards"
    shards.mkdir()
    first = write(shards / "a.jsonl", [{"id": "a", "image": "0.png", "caption": "x"}])
    with pytest.raises(CloverError, match="would overwrite"):
        check_file(shards, images=folder, out=first)
    with pytest.raises(CloverError, match="be read as some; write the list to another folder"):
        check_file(shards, images=folder, out=shards / "aside.jsonl")
    check_file(shards, images=folder, out=folder / "aside.jsonl")
    assert sorted(file.name for file in shards.iterdir()) == ["a.jsonl"]


def test_regions_of_one_slide_are_one_group(folder: Path) -> None:
    (folder / "s.svs").write_bytes(b"a slide")
    regions = [f"s.svs#{x},0,100,100" for x in (0, 200, 400)]
    rows = [
        {"id": str(n), "image": name, "caption": "x", "split": "train" if n else "test"}
        for n, name in enumerate([*regions[:2], "0.png"])
    ]
    first, out = write(folder / "a.jsonl", rows), folder / "aside.jsonl"
    second = write(folder / "b.jsonl", [{"id": "z", "image": regions[2], "caption": "x"}])
    found = check_file(first, against=second, out=out)
    assert found.straddling == ["s.svs"]
    assert found.num_shared_groups == 1
    assert [row["content"]["id"] for row in rows_of(out)] == ["0", "1"]
    named = [{**rows[2], "group": regions[0]}, {**rows[1], "group": regions[1], "split": "test"}]
    assert check_file(write(folder / "c.jsonl", named)).straddling == ["s.svs"]
    plain = write(folder / "d.jsonl", [rows[2]])
    assert not check_file(plain, against=plain).num_shared_groups


def _write_slide(path: Path) -> None:
    """Write the 200 µm of tissue 0 at 1 µm per pixel, as a TIFF with a slide's resolution."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[282] = tags[283] = 10_000.0  # pixels a centimetre
    tags[296] = 3
    tissue(0).resize((200, 200)).save(path, tiffinfo=tags)


def test_regions_of_a_slide_are_images_of_their_own_and_one_slide_is_a_leak(folder: Path) -> None:
    _write_slide(folder / "s.tif")
    rows = [
        {"id": place, "image": f"s.tif#{place}", "caption": "x", "split": split}
        for place, split in (
            ("0,0,90,90", "train"),
            ("99,0,90,90", "test"),
            ("99.0,0,90,90", "test"),  # the same once more
        )
    ]
    first = write(folder / "a.jsonl", rows)
    alone = check_file(first)
    assert alone.num_duplicates == 1 and not alone.problems
    assert alone.straddling == ["s.tif"]
    second = write(folder / "b.jsonl", [{"id": "b", "image": "s.tif#99,99,90,90", "caption": "x"}])
    out = folder / "leaks.jsonl"
    found = check_file(first, against=second, out=out)
    assert "3 leaks on 3 images (0 same bytes, 3 of the same slide, 0 look alike)" in str(
        found.lines()
    )
    listed = [row["content"] for row in rows_of(out) if row["reason"] == "leak"]
    assert listed[0] == {
        "image": "s.tif#0,0,90,90",
        "other": "s.tif#99,99,90,90",
        "how": "same slide",
    }
