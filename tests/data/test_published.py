"""Real published texts: every form gives the same records, and the known sets are recognised."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forms import (
    Row,
    pathvqa_rows,
    write_conversations,
    write_lxmert,
    write_parquet,
    write_pickles,
)

from clover.data.importer import import_file
from clover.data.source.base import Options


@pytest.fixture(scope="module")
def rows(shared: Path) -> list[Row]:
    return pathvqa_rows(shared)


@pytest.fixture(scope="module")
def records(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The flat table's records, which every other form must give."""
    out = tmp_path_factory.mktemp("flat") / "pathvqa.jsonl"
    summary = import_file("pathvqa", shared / "data/text/pathvqa_qa.csv.gz", out=out)
    assert not summary.rejected
    return read(out)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def test_the_counts_are_the_published_ones(records: list[dict[str, Any]]) -> None:
    assert len(records) == 32_795 == len({record["id"] for record in records})
    found = Counter((record["split"], record["answer_type"]) for record in records)
    assert found == {
        ("train", "open"): 9949,
        ("train", "closed"): 9806,
        ("val", "open"): 3144,
        ("val", "closed"): 3135,
        ("test", "open"): 3370,
        ("test", "closed"): 3391,
    }
    images = Counter(split for split, _ in {(r["split"], r["image"]) for r in records})
    assert images == {"train": 2599, "val": 832, "test": 858}


@pytest.mark.parametrize("write", [write_pickles, write_lxmert, write_conversations, write_parquet])
def test_every_form_gives_identical_records(
    write: Callable[[Path, list[Row]], Path],
    rows: list[Row],
    records: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    if write is write_parquet:
        pytest.importorskip("pyarrow")
    out = tmp_path / "out.jsonl"
    summary = import_file("auto", write(tmp_path / "pvqa", rows), out=out)
    found = read(out)
    if write is write_parquet:  # its images lie beside the records
        for record in found:
            assert (out.parent / record["image"]).read_bytes() == record["group"].encode()
            record["image"] = record["image"].removeprefix("out-images/")
    assert summary.source == "pathvqa"
    assert sorted(found, key=_place) == sorted(records, key=_place)


def _place(record: dict[str, Any]) -> str:
    return str(record["id"])


def test_the_lxmert_test_split_is_the_flat_tables_and_is_recognised(
    shared: Path, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "test.jsonl"
    summary = import_file("auto", shared / "data/text/pathvqa_lxmert_test.json", out=out)
    assert read(out) == [record for record in records if record["split"] == "test"]
    assert summary.lines()[1] == (
        "test: 6,761 questions (3,370 open, 3,391 closed): "
        "PathVQA test (6,761 questions), by its counts and its words"
    )


def test_the_hubs_copy_without_repeats_is_told_from_the_original(
    rows: list[Row], tmp_path: Path
) -> None:
    pytest.importorskip("pyarrow")
    test = [row for row in rows if row["split"] == "test"]
    once = list({(r["img_id"], r["question"], r["answer"]): r for r in test}.values())
    out = tmp_path / "out.jsonl"
    summary = import_file("pathvqa", write_parquet(tmp_path / "hub", once, named=False), out=out)
    assert "PathVQA test without repeats (6,719 questions), by its counts and" in str(
        summary.lines()
    )
    assert len(list((tmp_path / "out-images").iterdir())) == 858 == len(summary.present)


def test_a_changed_answer_is_not_the_published_set(shared: Path, tmp_path: Path) -> None:
    changed = tmp_path / "pathvqa_lxmert_test.json"
    text = (shared / "data/text/pathvqa_lxmert_test.json").read_text()
    changed.write_text(text.replace('"squamous cell carcinoma": 1', '"melanoma": 1', 1))
    summary = import_file("pathvqa", changed, out=tmp_path / "out.jsonl")
    assert "as many as PathVQA test (6,761 questions), but other words" in summary.lines()[1]


def test_quilt_questions_are_joined_with_their_answers(shared: Path, tmp_path: Path) -> None:
    text = shared / "data/text"
    out = tmp_path / "out.jsonl"
    options = Options(truth=text / "quilt_gpt_answers.jsonl")
    summary = import_file("auto", text / "quilt_gpt_questions.jsonl", out=out, options=options)
    found = read(out)
    assert summary.source == "quilt-vqa" and len(found) == 326
    assert Counter(record["category"] for record in found) == {"conv": 256, "detail": 70}
    assert "cannonballs" in found[0]["answer"] and found[0]["question"].startswith("Can you")


def test_llava_meds_questions_have_their_caption(shared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    summary = import_file("auto", shared / "data/text/llava_med_eval_qa50_qa.jsonl", out=out)
    found = read(out)
    assert summary.source == "llava-med" and len(found) == 193
    assert found[0]["question"] == "What is the organ in the image?"
    assert found[0]["answer"].startswith("The organ in the image is the conjunctiva")
    assert found[0]["caption"].startswith("The gross histopathologic finding")


@pytest.mark.parametrize(
    ("name", "count"), [("captions_peir_histology", 966), ("patchgastricadc22_captions", 991)]
)
def test_caption_tables_are_read(name: str, count: int, shared: Path, tmp_path: Path) -> None:
    source = tmp_path / f"{name}.csv"
    shutil.copy(shared / "data/text" / source.name, source)
    summary = import_file("auto", source, out=tmp_path / "out.jsonl")
    assert (summary.source, summary.num_records) == ("records", count)
