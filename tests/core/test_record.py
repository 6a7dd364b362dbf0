"""Records as people have them: other columns, other line ends, and what is set aside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clover.core.errors import CloverError
from clover.core.record import (
    Record,
    image_path,
    iterate_records,
    read_records,
    write_records,
    write_rejected,
)
from clover.core.record_file import open_records


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "json"])
def test_every_form_with_every_line_end_gives_the_same_records(
    tmp_path: Path, form: str, end: str, mark: str
) -> None:
    rows = [
        {"id": "1", "image": "a.png", "caption": 'Glands, "back to back"; naïve – 40×'},
        {"id": "2", "image": "b.png", "caption": "Fat"},
    ]
    if form in ("csv", "tsv"):
        split = {"csv": ",", "tsv": "\t"}[form]
        quoted = [[value.replace('"', '""') for value in row.values()] for row in rows]
        lines = [split.join(rows[0])] + [split.join(f'"{v}"' for v in row) for row in quoted]
    elif form == "jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    else:
        lines = json.dumps(rows, ensure_ascii=False, indent=1).split("\n")
    path = tmp_path / f"data.{form}"
    path.write_bytes((mark + end.join(lines) + end).encode())
    found = read_records(path, needs="caption")
    assert [record.row() for record in found.records] == rows and found.rejected == []


def as_table(rows: list[list[str]], separator: str) -> str:
    return "".join(separator.join(row) + "\n" for row in rows)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-32", "cp1252"])
@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "json"])
def test_every_form_in_every_usual_encoding_gives_the_same_letters(
    tmp_path: Path, form: str, encoding: str
) -> None:
    rows = [{"id": str(n), "caption": f"naïve Übergänge – 40× {n}"} for n in range(3)]
    if form in ("csv", "tsv"):
        text = as_table(
            [["id", "caption"], *(list(row.values()) for row in rows)], ",\t"[form > "d"]
        )
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        text = "\n".join(lines) if form == "jsonl" else f"[{', '.join(lines)}]"
    path = tmp_path / f"t.{form}"
    path.write_bytes(text.encode(encoding))
    assert [record.row() for record in read_records(path, needs="caption").records] == rows


def test_one_wrong_byte_changes_no_other_letter(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes("caption\nnaïve – \n".encode() + "größer\n".encode("cp1252"))
    assert [r.caption for r in read_records(path).records] == ["naïve – ", "größer"]


@pytest.mark.parametrize("end", ["\r", "\r\n"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_table_is_cut_at_the_sign_its_header_has(
    tmp_path: Path, ending: str, separator: str, end: str
) -> None:
    rows = [["ID ", " Image", "CAPTION", "Site"], ["1", "a.png", f'"fat{separator} bone"', "skin"]]
    path = tmp_path / f"t.{ending}"
    path.write_bytes(as_table(rows, separator).replace("\n", end).encode())
    (record,) = read_records(path, needs="caption").records
    caption = f"fat{separator} bone"
    assert record.row() == {"id": "1", "image": "a.png", "caption": caption, "Site": "skin"}


def test_a_row_with_more_cells_than_its_header_is_set_aside_whole(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("image,caption\na.png,liver, with necrosis\nb.png,fat,, \n\nc.png\n")
    found = read_records(path)
    assert [record.row() for record in found.records] == [
        {"id": "t-3", "image": "b.png", "caption": "fat"},  # a spreadsheet's empty cells
        {"id": "t-4", "image": "c.png"},
    ]
    (row,) = found.rejected
    assert (row.line, row.content) == (2, ["a.png", "liver", " with necrosis"])
    assert row.reason == "more cells than the header: quote texts that hold commas"
    path.write_text("image,caption\na.png,liver, with necrosis\n")
    with pytest.raises(CloverError, match="no usable record: 1 more cells than the header"):
        read_records(path, needs="caption")


@pytest.mark.parametrize(
    ("row", "caption", "answer", "group"),
    [
        ({"Caption": "a title", "text": "theirs"}, "theirs", None, None),
        ({"Text": "theirs", "Label": 3, "Group": 7}, "theirs", None, None),
        ({"A": "Bone", "B": "Fat", "Answer": "Fat"}, None, "Fat", None),
        ({"A": "Bone", "B": "Fat"}, None, None, None),  # choices
        ({"a": "Fat", "GROUP": "case 7"}, None, "Fat", "case 7"),
        ({"Caption": "Fat", "Label": "tumour", "Response": "none"}, "Fat", None, None),  # classes
        ({"Caption": "Fat", "Answer_Type": "x"}, "Fat", None, None),
    ],
)
def test_columns_in_capitals_are_ours_where_they_hold_text(
    row: dict[str, object],
    caption: str | None,
    answer: str | None,
    group: str | None,
    tmp_path: Path,
) -> None:
    (record,) = read_records(write_rows(tmp_path / "t.jsonl", [row])).records
    assert (record.caption, record.answer, record.group) == (caption, answer, group)


def test_an_exact_synonym_comes_before_our_name_in_capitals(tmp_path: Path) -> None:
    row = {"Caption": "Short title", "text": "Liver with fat", "ID": "1", "uuid": "u1"}
    (record,) = read_records(write_rows(tmp_path / "t.jsonl", [row])).records
    assert (record.id, record.caption) == ("u1", "Liver with fat")
    (capitals,) = read_records(write_rows(tmp_path / "t.jsonl", [{"ID": "1", "Text": "b"}])).records
    assert (capitals.id, capitals.caption) == ("1", "b")


@pytest.mark.parametrize(("written", "read"), [("CLOSED", "closed"), ("Open", "open"), ("x", None)])
def test_an_answer_type_in_capitals_is_ours_where_it_reads_so(
    written: str, read: str | None, tmp_path: Path
) -> None:
    row = {"id": "1", "Answer": "yes", "Answer_Type": written}
    found = read_records(write_rows(tmp_path / "t.jsonl", [row]))
    assert [record.answer_type for record in found.records] == [read] and not found.rejected
    assert found.records[0].row().get("Answer_Type") == (None if read else written)


@pytest.mark.parametrize("odd", ["[" * 50_000 + "]" * 50_000, "9" * 5000])
def test_what_json_can_say_and_python_cannot_hold_is_set_aside(odd: str, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(f'{{"id": "1", "caption": "fat"}}\n{{"id": {odd}}}\n')
    found = read_records(path)
    assert [record.id for record in found.records] == ["1"]
    assert [(row.line, row.reason) for row in found.rejected] == [(2, "not a JSON object")]
    whole = tmp_path / "c.json"
    whole.write_text(f'[{{"id": {odd}}}]')
    with pytest.raises(CloverError, match=r"c\.json is not JSON") as said:
        read_records(whole)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        ("image;caption, long", ["image", "caption, long"]),
        ("image;caption;text, a, b, c", ["image", "caption", "text, a, b, c"]),
        ("site, or none;Caption;stain", ["site, or none", "caption", "stain"]),
        ("image,caption;long", ["image", "caption;long"]),
        ("one;two,three", ["one;two", "three"]),
    ],
)
def test_a_sign_inside_a_name_does_not_cut_a_table(
    header: str, columns: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "t.csv"
    sign = ";" if "".join(columns).count(";") < header.count(";") else ","
    path.write_text(f"{header}\n{sign.join('abcdef'[: len(columns)])}\n")
    (record,) = read_records(path).records
    assert set(record.row()) == {"id", *columns}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("t.parquet", r"a '\.parquet' file; here one file is read .* clover data import records"),
        ("t.csv.gz", r"a '\.gz' file; here one file is read .* clover data import records"),
        ("t.xlsx", r"no reader for '\.xlsx'; known: \.jsonl, .*\.csv, \.tsv$"),
        ("a b.pkl", r"clover data import records '\S*/a b\.pkl' --out F\.jsonl$"),
        ("folder", r"is a folder; here one file is read .* clover data import records"),
    ],
)
def test_what_cannot_be_read_here_is_named_with_what_can(
    tmp_path: Path, name: str, words: str
) -> None:
    if name == "folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CloverError, match=words) as said:
        read_records(tmp_path / name, needs="caption")
    assert "\n" not in str(said.value)


def test_other_peoples_column_names_are_understood_and_further_ones_kept(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "vqa.jsonl",
        [{"qid": 7, "img": "x.png", "sent": "Is there fat?", "label": "Yes", "site": "skin"}],
    )
    record = read_records(path, needs="question").records[0]
    assert (record.id, record.image, record.question) == ("7", "x.png", "Is there fat?")
    assert record.answer == "Yes" and record.row()["site"] == "skin"


def test_our_own_name_wins_over_a_synonym(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "c.jsonl", [{"caption": "ours", "text": "theirs", "image": "a", "path": "b"}]
    )
    record = read_records(path, needs="caption").records[0]
    assert (record.caption, record.image) == ("ours", "a")


def test_a_missing_column_names_those_found_and_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("image,captoin\na.png,Glands\n")
    with pytest.raises(CloverError) as error:
        read_records(path, needs="caption")
    message = str(error.value)
    assert "no 'caption' column (found: image, captoin)" in message
    assert "did you mean 'captoin'?" in message and "\n" not in message


def test_lines_that_cannot_be_used_are_set_aside_with_line_and_reason(tmp_path: Path) -> None:
    good = {
        "image": "a.png",
        "question": "Is there fat?",
        "answer": "Yes.",
        "answer_type": "CLOSED",
    }
    lines = [
        json.dumps({"id": 1, **good}),
        json.dumps({"id": 2, **good, "question": "  "}),
        json.dumps({"id": 3, **good, "answer": ""}),
        json.dumps({"id": 4, **good, "answer": "There is some fat."}),
        json.dumps({"id": 5, **good, "answer_type": "maybe"}),
        json.dumps({"id": 1, **good}),
        '{"id": 7, "torn',
        "[1, 2]",
        "",
        json.dumps({"id": 8, **good, "answer": "no, none"}),
    ]
    path = tmp_path / "vqa.jsonl"
    path.write_text("\n".join(lines))
    found = read_records(path, needs="question")
    assert [record.id for record in found.records] == ["1", "8"]
    reasons = {item.line: item.reason for item in found.rejected}
    assert reasons.pop(5).startswith("bad answer_type")
    assert reasons == {
        2: "empty question",
        3: "empty answer",
        4: "closed question answered with prose",
        6: "duplicate id",
        7: "not a JSON object",
        8: "not a JSON object",
    }
    assert found.summary().startswith("2 records; 7 set aside (2 not a JSON object")
    write_rejected(tmp_path / "rejected.jsonl", found.rejected)
    assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == 7
    write_rejected(tmp_path / "none.jsonl", [])
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.jsonl", None, "no file"),
        ("empty.jsonl", "", "the file is empty"),
        ("bad.json", "{", "is not JSON"),
        ("one.json", "{}", "is not a JSON list"),
        ("all-bad.jsonl", '{"caption": " "}\n', "no usable record: 1 empty caption"),
    ],
)
def test_a_file_without_one_good_record_is_one_line(
    tmp_path: Path, name: str, content: str | None, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(CloverError) as error:
        read_records(tmp_path / name, needs="caption")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_what_is_written_is_read_back_and_the_limit_holds(tmp_path: Path) -> None:
    records = [Record(id=str(i), image=f"{i}.png", caption=f"n° {i}") for i in range(5)]
    path = tmp_path / "deep" / "records.jsonl"
    assert write_records(path, records) == 5
    assert read_records(path).records == records
    assert read_records(path, limit=2).records == records[:2]
    assert list(iterate_records(path)) == records


def test_a_line_without_id_gets_one_that_tells_file_and_line(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "c.jsonl", [{"caption": "a"}, {"caption": "b"}])
    assert [record.id for record in read_records(path).records] == ["c-1", "c-2"]


def test_a_record_without_an_image_says_so(tmp_path: Path) -> None:
    assert image_path(Record(id="1", image="a.png"), tmp_path) == tmp_path / "a.png"
    with pytest.raises(CloverError, match="record 1 names no image"):
        image_path(Record(id="1"), tmp_path)


def test_lines_under_any_other_name_are_read(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "captions.out", [{"id": "1", "caption": "fat"}])
    assert read_records(path, needs="caption").records[0].caption == "fat"


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_image_names_that_no_stage_can_open_are_set_aside(suffix: str, tmp_path: Path) -> None:
    names = ["Gr\udcfcn.png", "a\0.png", "Grün.png"]
    rows = [{"id": str(n), "image": name, "caption": "c"} for n, name in enumerate(names)]
    path = tmp_path / f"c{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(rows))
    else:  # as other programs write the escape
        lines = [json.dumps(row).replace("udcfc", "uDCFC") + "\n" for row in rows]
        path.write_text("".join(lines))
    found = read_records(path)
    assert [record.image for record in found.records] == ["Grün.png"]
    assert [item.reason for item in found.rejected] == [
        "image name that is not UTF-8",
        "image name with a NUL",
    ]
    records, rejected = open_records(path)
    assert [record.image for record in records] == ["Grün.png"]
    assert rejected == found.rejected
