"""`clover data import`: other forms, zips, subsets, and mistakes in one line."""

from __future__ import annotations

import csv
import gzip
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from clover.cli import main
from clover.core.errors import CloverError
from clover.data.importer import import_file
from clover.data.lines import text_files_of
from clover.data.source.base import Options

QUILT = ["caption", "image_path", "subset", "split", "pathology"]
QUILT += ["corrected_text", "magnification", "height"]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def write_lookup(folder: Path) -> Path:
    """Quilt-1M's table with pandas' nameless first column; an image with two captions."""
    film = "72cHFeWTTbM_roi_1.jpg"
    rows = [
        ["first", film, "quilt", "train", "['Renal']", "one", "1.0", "900"],
        ["second", film, "quilt", "train", "['Renal']", "two", "", "900"],
        ["third", "b.jpg", "laion", "val", "[]", "three", "nan", "800"],
        ["", "c.jpg", "quilt", "val", "Bone", "four", "2.0", "700"],
        ["fifth", "gone.jpg", "quilt", "val", "Bone", "five", "2.0", "700"],
    ]
    path = folder / "quilt_1M_lookup.csv"
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["", *QUILT])
        writer.writerows([number, *row] for number, row in enumerate(rows))
    return path


def zip_of(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "/").replace("_DOT_", "."), data)
    return path


def test_quilt_keeps_many_captions_an_image_and_unknown_columns(tmp_path: Path) -> None:
    table = write_lookup(tmp_path)
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "b.jpg").write_bytes(b"b")
    first = zip_of(tmp_path / "1.zip", quilt_1m__72cHFeWTTbM_roi_1_DOT_jpg=b"a")
    second = zip_of(tmp_path / "2.zip", c_DOT_jpg=b"c")
    out = tmp_path / "records" / "quilt.jsonl"
    summary = import_file("auto", table, out=out, images=[folder, first, second])
    found = read(out)
    assert summary.source == "quilt1m" and [r["caption"] for r in found] == [
        "first",
        "second",
        "third",
        "fifth",
    ]
    assert found[0]["image"] == found[1]["image"] != found[2]["image"]
    assert [(out.parent / r["image"]).read_bytes() for r in found[:3]] == [b"a", b"a", b"b"]
    assert found[0]["group"] == "72cHFeWTTbM" and "group" not in found[2]
    assert found[0]["magnification"] == "1.0" and found[0]["height"] == "900"
    assert "pathology" not in found[2] and found[2]["split"] == "val"
    assert found[3]["image"] == "gone.jpg"
    lines = summary.lines()
    assert "2 of 3 images found" in lines
    assert any(line.startswith("1 set aside (1 empty caption)") for line in lines)
    assert read(out.with_name("quilt.jsonl.rejected.jsonl"))[0]["line"] == 5


@pytest.mark.parametrize(
    ("subset", "captions"),
    [
        (("pathology",), ["one", "two", "four", "five"]),
        (("subset=laion",), ["three"]),
        (("pathology", "split=val"), ["four", "five"]),
    ],
)
def test_a_subset_and_a_text_column_are_chosen(
    subset: tuple[str, ...], captions: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    options = Options(subset, "corrected_text")
    summary = import_file("quilt1m", write_lookup(tmp_path), out=out, options=options)
    assert [record["caption"] for record in read(out)] == captions
    assert summary.num_left_out == 5 - len(captions)


def test_a_zip_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("image,caption\nx.jpg,something\n")
    archive = zip_of(tmp_path / "evil.zip", **{"..__..__x_DOT_jpg": b"x"})
    out = tmp_path / "deep" / "er" / "out.jsonl"
    import_file("records", table, out=out, images=[archive])
    image = (out.parent / read(out)[0]["image"]).resolve()
    assert image.is_relative_to(out.parent) and image.read_bytes() == b"x"


def test_quilt_vqa_takes_the_bare_word_as_a_closed_questions_answer(tmp_path: Path) -> None:
    truth = [
        {
            "id": 1,
            "image": "a.jpg",
            "question": "Where?",
            "answer": "In it.",
            "answer_type": "OPEN",
        },
        {
            "id": 2,
            "image": "a.jpg",
            "question": "Is it?",
            "answer": "Yes, it is seen.",
            "answer_type": "CLOSED",
            "yes_no_answer": "Yes",
            "context": "said",
        },
        {"id": 2, "image": "b.jpg", "question": "Is it?", "answer": "No.", "answer_type": "CLOSED"},
        {"id": 4, "image": "b.jpg", "question": "Is it?", "answer": "?", "answer_type": "CLOSED"},
    ]
    path = tmp_path / "quiltvqa_test_w_ans.json"
    path.write_text(json.dumps(truth))
    out = tmp_path / "out.jsonl"
    summary = import_file("auto", path, out=out)
    found = read(out)
    assert summary.source == "quilt-vqa"
    assert [(r["answer"], r["answer_type"]) for r in found] == [
        ("In it.", "open"),
        ("yes", "closed"),
        ("no", "closed"),
    ]
    assert found[1]["explanation"] == "Yes, it is seen." and found[1]["context"] == "said"
    assert len({record["id"] for record in found}) == 3
    assert summary.rejected == {"empty answer": 1}
    lines = [
        {"question_id": r["id"], "image": r["image"], "text": r["question"]} for r in truth[:2]
    ]
    asked = tmp_path / "quiltvqa_test_questions.jsonl"
    asked.write_text("\n".join(map(json.dumps, lines)))
    joined = tmp_path / "joined.jsonl"
    only = tmp_path / "truth.json"
    only.write_text(json.dumps(truth[:2]))
    import_file("quilt-vqa", asked, out=joined, options=Options(truth=only))
    assert read(joined) == found[:2]


def test_the_counts_alone_name_quilt_vqa(tmp_path: Path) -> None:
    rows = [
        {"id": n, "question": "q", "answer": "yes", "answer_type": "OPEN" if n < 940 else "CLOSED"}
        for n in range(1283)
    ]
    path = tmp_path / "t.json"
    path.write_text(json.dumps(rows))
    summary = import_file("quilt-vqa", path, out=tmp_path / "out.jsonl")
    assert "QUILT-VQA (940 open and 343 closed questions) by its counts" in summary.lines()[1]


def test_llava_meds_turns_are_records(tmp_path: Path) -> None:
    turns = [("human", "<image>\nWhat?"), ("gpt", "A cell."), ("human", "Is it?"), ("gpt", "Yes")]
    row = {
        "id": "f1",
        "image": "f1.jpg",
        "domain": {"histology": True},
        "conversations": [{"from": who, "value": text} for who, text in turns],
    }
    path = tmp_path / "llava_med_instruct.json"
    path.write_text(json.dumps([row, {"id": "f2", "conversations": []}]))
    summary = import_file("auto", path, out=tmp_path / "out.jsonl")
    found = read(tmp_path / "out.jsonl")
    assert [(r["id"], r["question"], r["answer"], r["answer_type"]) for r in found] == [
        ("f1-1", "What?", "A cell.", "open"),
        ("f1-2", "Is it?", "Yes", "closed"),
    ]
    assert found[0]["domain"] == {"histology": True}
    assert summary.rejected == {"empty question": 1}


@pytest.mark.parametrize(
    "text",
    [
        "Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label\n"
        "a.jpg,What is it?,Bone,A:Skin,B:Bone,C:Lung,D:Liver,B\n",
        "index,Figure_path,Caption,Question,Choice A,Choice B,Choice C,Choice D,Answer,split\n"
        "0,a.jpg,,What is it?, A: Skin, B: Bone, C: Lung, D: Liver,B,test\n",
    ],
)
def test_both_layouts_of_pmc_vqa_give_the_choices_text(text: str, tmp_path: Path) -> None:
    path = tmp_path / "test_2.csv"
    path.write_text(text)
    summary = import_file("auto", path, out=tmp_path / "out.jsonl")
    (record,) = read(tmp_path / "out.jsonl")
    assert summary.source == "pmc-vqa"
    assert (record["answer"], record["split"], record["image"]) == ("Bone", "test", "a.jpg")
    assert record["choices"] == ["Skin", "Bone", "Lung", "Liver"]


def test_plain_tables_say_the_same_in_every_form(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "caption": "None", "stain": "H&E"}, {"image": "b", "caption": "x"}]
    (tmp_path / "t.csv").write_text("image,caption,stain\na.png,None,H&E\nb,x,\n")
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "t.json").write_text(json.dumps(rows))
    found = []
    for name in ("t.csv", "t.jsonl", "t.json"):
        import_file("auto", tmp_path / name, out=tmp_path / "out.jsonl")
        found.append([{**r, "id": ""} for r in read(tmp_path / "out.jsonl")])
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    import_file("auto", tmp_path / "t.parquet", out=tmp_path / "out.jsonl")
    found.append([{**r, "id": ""} for r in read(tmp_path / "out.jsonl")])
    assert found[0][0] == {"id": "", **rows[0]}
    assert all(other == found[0] for other in found)


def test_a_cut_text_is_set_aside_and_does_not_hide_the_form(tmp_path: Path) -> None:
    path = tmp_path / "test_2.csv"
    path.write_text(
        "Figure_path,Question,Answer,Choice A,Choice B\n"
        "a.jpg,What, if any, is it?,A,Skin,Bone\n"
        "a.jpg,What is it?,B,Skin,Bone\n"
    )
    summary = import_file("auto", path, out=tmp_path / "out.jsonl")
    assert summary.source == "pmc-vqa" and [r["answer"] for r in read(tmp_path / "out.jsonl")] == [
        "Bone"
    ]
    assert summary.rejected == {"more cells than the header: quote texts that hold commas": 1}
    (aside,) = read(tmp_path / "out.jsonl.rejected.jsonl")
    assert aside["line"] == 2 and aside["content"][1:3] == ["What", " if any"]


@pytest.mark.parametrize("name", ["X.PARQUET", "x.Pkl.GZ", "x.parquet"])
def test_a_binary_file_is_not_looked_over_as_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\xff\n")
    assert text_files_of(tmp_path / name) == []


@pytest.mark.parametrize("ending", [".csv", ".csv.gz"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "cp1252"])
def test_no_letter_is_lost_in_any_usual_encoding(
    encoding: str, ending: str, tmp_path: Path
) -> None:
    path = tmp_path / f"t{ending}"
    data = "image;caption\na.png;naïve Übergänge – 40×\nb.png;fat\n".encode(encoding)
    path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    summary = import_file("auto", path, out=tmp_path / "out.jsonl")
    assert read(tmp_path / "out.jsonl")[0]["caption"] == "naïve Übergänge – 40×"
    said = [line for line in summary.lines() if "not UTF-8" in line]
    assert len(said) == (encoding == "cp1252")
    for line in said:
        assert line.startswith(
            f"1 lines are not UTF-8 and were read as Windows-1252 (first: t{ending}"
        )


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def test_a_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "test_qa.pkl"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps([_Evil()], protocol=protocol))
        with pytest.raises(CloverError, match=r"asks for (posix|nt)\.mkdir.*nothing was run"):
            import_file("pathvqa", path, out=tmp_path / "out.jsonl")
    assert not (tmp_path / "ran").exists()


def test_plain_pickles_of_every_protocol_are_read(tmp_path: Path) -> None:
    path = tmp_path / "test_qa.pkl"
    row = {"image": "test_0001", "question": "é?", "answer": "no", "more": [{1}, b"x\xff", 1.5]}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps([row], protocol=protocol))
        import_file("auto", path, out=tmp_path / "out.jsonl")
        (record,) = read(tmp_path / "out.jsonl")
        assert record["question"] == "é?" and record["answer_type"] == "closed"


def test_images_lie_in_a_folder_named_by_the_split(tmp_path: Path) -> None:
    place = tmp_path / "images" / "test" / "test_0001.jpg"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"x")
    table = tmp_path / "pathvqa.csv"
    table.write_text("img_id,question,answer\ntest_0001,Is it?,no\n")
    import_file("pathvqa", table, out=tmp_path / "o.jsonl", images=[tmp_path / "images"])
    assert read(tmp_path / "o.jsonl")[0]["image"] == "images/test/test_0001.jpg"


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(CloverError, match=r"clover-pathology\[parquet\]"):
        import_file("records", path, out=tmp_path / "o.jsonl")


MISTAKES: list[tuple[str, bytes, list[str], str]] = [
    ("t.csv", b"image,caption\na,b\n", ["pathvqu"], "no source 'pathvqu'; did you mean 'pathvqa'?"),
    ("t.csv", b"image,caption\na,b\n", ["records", "--out", "o.csv"], "call --out o.jsonl"),
    ("t.csv", b"image,caption\n", ["auto"], "holds no row"),
    ("t.csv", b"image,caption\na,\n", ["auto"], "no usable record (records): 1 no caption"),
    ("t.csv", b"image,captoin\na,b\n", ["auto"], "(found: image, captoin); did you mean 'captoin'"),
    ("t.csv", b"image,caption\na,b\n", ["auto", "--subset", "captoin"], "did you mean 'caption'?"),
    ("t.csv", b"image,caption\na,b\n", ["auto", "--images", "none.zip"], "no folder or zip file"),
    ("t.csv", b"image,caption\na,b\n", ["auto", "--images", "t.csv"], "neither a folder nor"),
    ("t.json", b"{}", ["auto"], "holds a dict; a list of rows is needed"),
    ("t.json", b"[1", ["auto"], "is not JSON"),
    ("t.pkl", b"nonsense", ["auto"], "is not a readable pickle"),
    ("t.pkl", b"", ["auto"], "is not a readable pickle"),
    ("t.txt", b"x", ["auto"], "no reader for '.txt'"),
    ("t.csv.gz", b"x", ["auto"], "is not whole gzip"),
    ("t.parquet", b"x", ["auto"], "is not readable Parquet"),
    ("quiltvqa.jsonl", b'{"text": "Is it?", "image": "a"}', ["auto"], "--truth"),
]


@pytest.mark.parametrize(("name", "data", "arguments", "words"), MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(
    name: str,
    data: bytes,
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(data)
    with pytest.raises(SystemExit) as stop:
        main(["data", "import", arguments[0], name, "--out", "out.jsonl", *arguments[1:]])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and words in said
    assert said.count("\n") == 1 and said.startswith("clover: ")
    assert [path.name for path in tmp_path.iterdir()] == [name]
