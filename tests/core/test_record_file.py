"""Records found by where their lines begin are those that reading the whole file gives."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clover.core import record_file
from clover.core.errors import CloverError
from clover.core.record import Needs, Rejection, read_records
from clover.core.record_file import (
    RecordFile,
    columns,
    open_records,
    select,
    sha256_records,
    stream_records,
)

GOOD: dict[str, Any] = {
    "image": "a/b.png",
    "caption": "Glands – 40×",
    "question": "Is there fat?",
    "answer": "Yes.",
    "answer_type": "closed",
}
# Each changes a good row into one that some reader must rename, refuse, or take as it is.
CHANGES: list[dict[str, Any]] = [
    {},
    {"id": 7},
    {"id": None},
    {"id": 1.5},
    {"image": None, "img": "c.png"},
    {"image": ""},
    {"image": 3},
    {"caption": "  "},
    {"caption": None, "text": "Fat"},
    {"caption": ["Fat"]},
    {"answer": "There is fat."},
    {"answer": "no, none", "answer_type": "CLOSED"},
    {"answer_type": "maybe"},
    {"answer_type": ""},
    {"question": None, "sent": "Where?", "answer_type": "open"},
    {"licence": None, "license": "CC-BY"},
    {"site": "skin", "magnification": 3},
    {"caption": "half a sign: \ud83d"},
    {"image": "Gr\udcfcn.png"},
    {"image": "Grün \U0001f600.png"},
    {"image": "b\0.png"},
    {"id": "twice"},
    {"id": "twice", "caption": "another"},
    {"caption": None, "Caption": "Fat", "Magnification": 3},
    {"answer": "some", "answer_type": None, "Answer_Type": "CLOSED"},
    {"caption": None, "Caption": "Title", "text": "Fat"},
    {"answer": None, "Answer": "no"},
    {"answer": None, "Label": "tumour"},
    {"answer_type": None, "Answer_Type": "x"},
    {"Group": 3, "GROUP": "case", "Label": 4},
    {"answer": None, "label": 3},
    {"caption": "Größe", "site": "in Windows-1252"},
]
RAW = ["", "   ", "null", "[1, 2]", '{"id": 1, "torn', '"text"', '{"id": "x"} trailing', "nan"]


def write(path: Path, *, seed: int, num_lines: int) -> Path:
    draw = random.Random(seed)
    lines = []
    for number in range(num_lines):
        if draw.random() < 0.2:
            lines.append(draw.choice(RAW))
        else:
            row = {"id": f"r{number}", **GOOD, **draw.choice(CHANGES)}
            lines.append(json.dumps(row, ensure_ascii=draw.random() < 0.5 or "half" in str(row)))
    text = draw.choice(["\n", "\r\n"]).join(lines) + draw.choice(["", "\n"])
    data = b"".join(
        line.encode("cp1252")
        if "Windows" in line and "ö" in line
        else line.encode(errors="backslashreplace")
        for line in text.splitlines(keepends=True)
    )
    path.write_bytes(draw.choice([b"", b"\xef\xbb\xbf"]) + data)
    return path


@pytest.mark.parametrize("needs", ["any", "caption", "question"])
@pytest.mark.parametrize("seed", range(5))
def test_messy_lines_give_the_same_records_and_the_same_rejections(
    seed: int, needs: Needs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_file, "_CHUNK", 7)
    path = write(tmp_path / "c.jsonl", seed=seed, num_lines=100)
    expected = read_records(path, needs=needs)
    names: list[str | None] = []
    records, rejected = open_records(path, needs=needs, visit=names.extend)
    assert isinstance(records, RecordFile) and len(records) == len(expected.records) > 20
    assert list(records) == expected.records
    assert names == [record.image for record in expected.records]
    told = {(item.source, item.line, item.reason) for item in rejected}
    assert told == {(item.source, item.line, item.reason) for item in expected.rejected}
    for name in ("id", "caption", "question", "answer", "answer_type", "licence", "site"):
        wanted = [getattr(record, name, None) for record in expected.records]
        assert [value for (value,) in columns(records, name)] == wanted
    assert list(columns(records, "answer", "id")) == list(columns(expected.records, "answer", "id"))
    assert len(rejected) == len(expected.rejected)


def test_windows_1252_is_read_at_its_places(tmp_path: Path) -> None:
    rows = [{"id": str(n), "image": "a.png", "caption": f"Größe – {n}"} for n in range(4)]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path = tmp_path / "c.jsonl"
    path.write_bytes("".join(lines[:2]).encode("cp1252") + "".join(lines[2:]).encode())
    records, rejected = open_records(path, needs="caption")
    assert [records[n].row() for n in (3, 0, 2, 1)] == [rows[n] for n in (3, 0, 2, 1)]
    assert [text for (text,) in columns(records, "caption")] == [row["caption"] for row in rows]
    assert rejected == []


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_lines_without_places_of_their_own_are_refused(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "c d.jsonl"
    path.write_bytes((json.dumps({"id": "1", **GOOD}) + "\n").encode(encoding))
    for read in (open_records, lambda file: list(stream_records(file))):
        with pytest.raises(
            CloverError, match=r"is UTF-.*as UTF-8: clover data import records '\S*/c d"
        ):
            read(path)


def test_a_folder_of_shards_is_one_set_and_an_id_of_two_shards_is_given_once(
    tmp_path: Path,
) -> None:
    for part, ids in {"b/2": "cd", "a/1": "ab", "b/3": "", "b/4": "be"}.items():
        path = tmp_path / f"{part}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps({"id": i, "image": f"{i}.png"}) + "\n" for i in ids))
    names: list[str | None] = []
    records, rejected = open_records(tmp_path, visit=names.extend)
    assert [record.id for record in records] == ["a", "b", "c", "d", "e"]
    assert names == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert [(item.source, item.line, item.reason) for item in rejected] == [
        (str(tmp_path / "b/4.jsonl"), 1, "duplicate id")
    ]
    assert [r.id for r in records[1:4]] == ["b", "c", "d"] and records[-1].id == "e"
    chosen = select(records, np.array([True, False, False, True, False]))
    assert [record.id for record in chosen] == ["a", "d"]
    assert [r.id for r in select(list(records), np.arange(5) == 2)] == ["c"]


def test_parquet_is_the_same_records_by_itself_and_as_shards(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"id": f"r{i}", "image": f"{i}.png", "caption": f"case {i} – 40×"} for i in range(9)]
    rows[4]["caption"] = " "
    (tmp_path / "shards").mkdir()
    whole = tmp_path / "whole.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), whole)
    for part in range(3):
        table = pyarrow.Table.from_pylist(rows[3 * part : 3 * part + 3])
        parquet.write_table(table, tmp_path / "shards" / f"{part}.parquet")
    expected = [row for row in rows if row is not rows[4]]
    for path, line, source in (
        (whole, 5, whole),
        (tmp_path / "shards", 2, tmp_path / "shards" / "1.parquet"),
    ):
        for _ in range(2):  # the second time from what was unpacked
            records, rejected = open_records(path, needs="caption", unpacked=tmp_path / "u")
            assert [record.row() for record in records] == expected
            told = [(item.source, item.line, item.reason) for item in rejected]
            assert told == [(str(source), line, "empty caption")]
    assert len(list((tmp_path / "u").iterdir())) == 4
    parquet.write_table(pyarrow.Table.from_pylist(rows[:2]), whole)  # another file by that name
    assert len(open_records(whole, unpacked=tmp_path / "u")[0]) == 2
    table = pyarrow.Table.from_pylist([{"id": "1", "image": {"bytes": b"1", "path": "1.png"}}])
    parquet.write_table(table, whole)
    with pytest.raises(CloverError, match="clover data import records"):
        open_records(whole, unpacked=tmp_path / "u")


def test_a_file_that_changes_under_us_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    rows = [{"id": str(i), "image": "a.png", "caption": "Glands"} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records, _ = open_records(path, needs="caption")
    with path.open("r+b") as handle:
        handle.seek(5)
        handle.write(b"}")
    with pytest.raises(CloverError, match=r"c\.jsonl changed while it was read: line 1 is") as said:
        records[0]
    assert "\n" not in str(said.value) and records[1].id == "1"
    path.write_text("")  # cut off in place
    with pytest.raises(CloverError, match=r"changed while it was read: line 2 is"):
        records[1]


def test_long_lines_and_more_files_than_are_kept_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_file, "_FILES", 3)
    monkeypatch.setattr(record_file, "_PIECE", 16)
    rows = [{"id": f"{n:02d}", "image": "a.png", "caption": "w" * (n * 7)} for n in range(1, 20)]
    for row in rows:
        (tmp_path / f"{row['id']}.jsonl").write_text(json.dumps(row))
    records, _ = open_records(tmp_path, needs="caption")
    order = random.Random(0).sample(range(19), 19) * 2
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(records.__getitem__, order))
    assert [record.row() for record in found] == [rows[place] for place in order]


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no file"), ("", "the file is empty"), ('{"id": "1"}\n', "has no 'caption' column")],
)
def test_nothing_usable_is_said_as_for_small_files(
    content: str | None, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CloverError, match=words) as ours:
        open_records(path, needs="caption")
    with pytest.raises(CloverError) as theirs:
        read_records(path, needs="caption")
    assert str(ours.value) == str(theirs.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CloverError, match="holds no file of records"):
        open_records(tmp_path / "empty")


def test_files_of_one_name_in_two_folders_keep_their_records_apart(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        lines = [json.dumps({**GOOD, "caption": f"{folder} {n}"}) + "\n" for n in range(3)]
        (tmp_path / folder / "records.jsonl").write_text("".join(lines))
    records, rejected = open_records(tmp_path)
    assert rejected == [] and len({record.id for record in records}) == 6
    assert records[4].id == "two/records-2" and records[4].caption == "two 1"


def test_a_run_folder_inside_is_no_data_and_changes_no_hash(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "a", **GOOD}) + "\n")
    before = sha256_records(tmp_path)
    run = tmp_path / "run"
    (run / "deep").mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: x")
    (run / "metrics.jsonl").write_text("{}\n")
    (run / "deep" / "align.rejected.jsonl").write_text("{}\n")
    (tmp_path / "images.png").write_bytes(b"pixels")
    records, rejected = open_records(tmp_path)
    assert [record.id for record in records] == ["a"] and rejected == []
    assert sha256_records(tmp_path) == before
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "b", **GOOD}) + "\n")
    assert sha256_records(tmp_path) != before
    (tmp_path / "b.parquet").write_bytes(b"")
    with pytest.raises(CloverError, match="both JSON Lines and Parquet"):
        open_records(tmp_path)


def test_parquet_rows_without_ids_are_named_after_their_own_file(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist([GOOD, {**GOOD, "caption": "another"}])
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "val.parquet")
    records, _ = open_records(tmp_path / "val.parquet", unpacked=tmp_path / "lines")
    assert [record.id for record in records] == ["val-1", "val-2"]


def test_records_streamed_are_those_that_are_opened(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    write(tmp_path / "a.jsonl", seed=3, num_lines=60)
    path = write(tmp_path / "b" / "c.jsonl", seed=4, num_lines=60)
    deep = "[" * 100_000
    path.write_bytes(path.read_bytes() + f'{deep}\n{{"id": {"9" * 5000}}}\n'.encode())
    records, rejected = open_records(tmp_path)
    streamed = list(stream_records(tmp_path))
    seen: set[str] = set()
    good, aside = [], []
    for file, line, item in streamed:
        if isinstance(item, Rejection):
            aside.append((str(file), line, item.reason))
        elif item.id in seen:
            aside.append((str(file), line, "duplicate id"))
        else:
            seen.add(item.id)
            good.append(item)
    assert good == list(records)
    assert sorted(aside) == sorted((one.source, one.line, one.reason) for one in rejected)


def test_parquet_streamed_is_refused_as_when_it_is_opened(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    table = pyarrow.Table.from_pylist([{"id": "1", "image": {"bytes": b"1", "path": "1.png"}}])
    parquet.write_table(table, path)
    with pytest.raises(CloverError) as opened:
        open_records(path, unpacked=tmp_path / "u")
    with pytest.raises(CloverError) as streamed:
        list(stream_records(path))
    assert str(opened.value) == str(streamed.value)
