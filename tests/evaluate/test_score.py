"""Scores of whole files: values, intervals, baselines, and what becomes of bad input."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clover.core.errors import CloverError
from clover.core.known import KnownSet
from clover.evaluate.score import num_workers, per_log_parameters, score, score_file

Row = dict[str, Any]


def row(number: int, answer: str, prediction: Any, **more: Any) -> Row:
    question = f"What is thing {number}?"
    return {"id": number, "question": question, "answer": answer, "prediction": prediction, **more}


def many(count: int, seed: int = 0) -> list[Row]:
    rng = random.Random(seed)
    words = ["yes", "no", "liver", "fat cells", "fat", "not seen"]
    return [
        row(at, rng.choice(words), rng.choice(words), image=f"{at // 4}.png") for at in range(count)
    ]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(entry) for entry in rows) + "\n", encoding="utf-8")
    return path


def warnings_of(path: Path, **options: Any) -> tuple[dict[str, Any], str]:
    found = score_file(path, "strict", draws=20, **options)["strict"]
    return found, "\n".join(found["details"]["warnings"])


def test_scores_are_percent_with_n_and_interval() -> None:
    found = score([row(1, "yes", "yes"), row(2, "no", "yes"), row(3, "fat cells", "fat")])
    assert (found["closed"]["value"], found["closed"]["n"]) == (50.0, 2)
    assert (found["open_recall"]["value"], found["open_precision"]["value"]) == (50.0, 100.0)
    assert found["open_exact"] == {"value": 0.0, "n": 1, "low": 0.0, "high": 0.0}
    assert found["closed"]["low"] == 0.0
    assert found["closed"]["high"] == 100.0
    assert found["details"]["version"] == "1"


def test_several_protocols_give_one_dictionary_each() -> None:
    found = score([row(1, "no", "nodule")], "strict,llava-med", draws=0)
    assert found["strict"]["closed"]["value"] == 0.0
    assert found["llava-med"]["closed"]["value"] == 100.0


def test_answer_type_is_told_by_the_answer_where_it_is_missing() -> None:
    found = score([row(1, "Yes.", "yes"), row(2, "no answer", "x")], draws=0)
    assert (found["closed"]["n"], found["open_f1"]["n"]) == (1, 1)
    stated = score([row(1, "No, it is benign", "no", answer_type="CLOSED")], draws=0)
    assert stated["closed"] == {"value": 100.0, "n": 1, "low": None, "high": None}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(4, 60))
def test_score_is_unchanged_by_row_order(seed: int, count: int) -> None:
    rows = many(count, seed)
    shuffled = random.Random(seed + 1).sample(rows, count)
    first = score(rows, "strict,llava-med,quilt", draws=50)
    second = score(shuffled, "strict,llava-med,quilt", draws=50)
    for name in first:
        for key in ("closed", "open_recall", "open_f1"):
            for figure in ("value", "n", "low", "high"):
                assert first[name][key][figure] == pytest.approx(second[name][key][figure])
        assert first[name]["details"]["question_only"] == second[name]["details"]["question_only"]


def test_a_yes_sayer_gets_the_base_rate_and_is_seen() -> None:
    rows = [row(at, "yes" if at % 10 < 3 else "no", "Yes!") for at in range(200)]
    found = score(rows, draws=100)
    details = found["details"]
    assert found["closed"]["value"] == pytest.approx(details["base_rate"]) == pytest.approx(30)
    assert (details["yes_rate"], details["unparsed"]) == (100.0, 0.0)
    assert details["majority"]["closed"] == 70.0


def test_unparsed_answers_are_counted() -> None:
    rows = [row(1, "yes", "perhaps"), row(2, "no", "no"), row(3, "no", ""), row(4, "no", "normal")]
    assert score(rows, draws=0)["details"]["unparsed"] == 75.0


def test_interval_is_wider_when_answers_within_an_image_agree() -> None:
    rng = random.Random(0)
    right = [rng.random() < 0.5 for _ in range(60)]
    alike = [
        row(at, "yes", "yes" if right[at // 10] else "no", image=f"{at // 10}") for at in range(600)
    ]
    alone = [{**entry, "image": None} for entry in alike]
    by_image, by_item = score(alike), score(alone)
    assert by_image["closed"]["value"] == by_item["closed"]["value"]
    width = by_image["closed"]["high"] - by_image["closed"]["low"]
    # Ten like answers an image are one: the interval is about sqrt(10) times as wide.
    assert width > 2.5 * (by_item["closed"]["high"] - by_item["closed"]["low"])
    assert by_image["details"]["clustered_by"] == "image"
    assert by_item["details"]["clustered_by"] == "item"


def test_interval_of_independent_items_is_the_binomial_one() -> None:
    found = score([row(at, "yes", "yes" if at % 4 else "no") for at in range(1000)])["closed"]
    half = 1.96 * 100 * (0.75 * 0.25 / 1000) ** 0.5
    assert found["high"] - found["low"] == pytest.approx(2 * half, rel=0.1)


def test_the_same_seed_gives_the_same_interval() -> None:
    rows = many(80)
    assert score(rows, seed=3) == score(rows, seed=3)
    assert score(rows, seed=3)["closed"]["low"] != score(rows, seed=4)["closed"]["low"]


def test_question_only_baseline_knows_questions_not_their_own_answers() -> None:
    stain = [row(at, "H&E" if at else "PAS", "x", form="stain") for at in range(10)]
    alone = [row(100, "liver", "x")]
    details = score(stain + alone, draws=0)["details"]
    # Nine of ten are right by the other rows; the tenth, and the lone question, are not.
    assert details["question_only"]["open_exact"] == pytest.approx(100 * 9 / 11)
    balanced = [row(at, "yes" if at % 2 else "no", "x", form="q") for at in range(20)]
    assert score(balanced, draws=0)["details"]["question_only"]["closed"] == 50.0


def test_dropped_items_leave_the_denominator_with_a_warning() -> None:
    found = score([row(1, "no", "yes"), row(2, "no", "no")], "llava-med-pvqa", draws=0)
    assert (found["closed"]["value"], found["closed"]["n"]) == (100.0, 1)
    assert found["details"]["dropped"] == 1
    assert "inflates" in found["details"]["warnings"][0]


def test_a_known_test_set_is_told_by_its_counts() -> None:
    rows = [row(at, "yes" if at < 343 else "fat", "yes") for at in range(1283)]
    assert score(rows, draws=0)["details"]["known_set"] == (
        "QUILT-VQA (940 open and 343 closed questions) by its counts "
        "(its words were not at hand to compare)"
    )
    assert score(rows[1:], draws=0)["details"]["known_set"] is None


def test_a_known_test_set_is_told_by_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    known = KnownSet(name="three", open=2, closed=1, words=f"{_sum_of_hashes():032x}")
    monkeypatch.setattr("clover.core.known.known_sets", lambda: (known,))
    rows = [row(0, "yes", "no"), row(1, "fat", "x"), row(2, "Liver ", "x")]
    told = [score(found, draws=0)["details"]["known_set"] for found in (rows, rows[::-1])]
    assert told == ["three, by its counts and its words"] * 2
    rows[1]["question"] += " Really?"
    assert score(rows, draws=0)["details"]["known_set"] == "as many as three, but other words"


def _sum_of_hashes() -> int:
    texts = [f"what is thing {at}?\n{word}" for at, word in enumerate(("yes", "fat", "liver"))]
    halves = (sha256(text.encode()).digest()[:16] for text in texts)
    return sum(int.from_bytes(half) for half in halves) % 2**128


def test_score_per_log_parameters_is_the_papers_figure() -> None:
    assert round(per_log_parameters(89.38, 187e6), 2) == 39.34
    with pytest.raises(CloverError, match="more than 1,000,000"):
        per_log_parameters(89.38, 187)


def test_header_is_kept_out_of_the_score(tmp_path: Path) -> None:
    rows = [{"header": {"prompt": "Answer."}}, row(1, "yes", "yes")]
    found, _ = warnings_of(write(tmp_path / "p.jsonl", rows))
    assert found["closed"]["n"] == 1
    assert found["details"]["header"] == {"prompt": "Answer."}


def test_odd_lines_are_counted_and_the_rest_is_scored(tmp_path: Path) -> None:
    rows = [
        row(1, "yes", "yes"),
        row(1, "yes", "no"),
        row(2, "yes", float("nan")),
        row(3, "yes", ["yes"]),
        row(4, "yes", ["yes", "no"]),
        {**row(5, "yes", "yes"), "answer": ["yes", "no"]},
        {**row(6, "yes", "yes"), "answer": float("nan")},
        {"question": "Q?", "answer": "no", "prediction": "no"},
        [1, 2],
        row(8, "yes", "yes", answer_type="weird"),
    ]
    path = write(tmp_path / "p.jsonl", rows)
    path.write_text(path.read_text() + "{broken\n", encoding="utf-8")
    found, warnings = warnings_of(path)
    # 1, 3, the one without id, and 8 are right; 2 and 4 said nothing.
    assert (found["closed"]["value"], found["closed"]["n"]) == (pytest.approx(100 * 4 / 6), 6)
    for line in (
        "1 items repeat an id and were left out: the first counts (first: 1)",
        "2 items have no prediction that is one text: scored as empty (first: 2)",
        "2 items have an answer that is not one text to compare with and were left out (first: 5)",
        "1 items have no id: numbered by their line",
        "1 items have the unknown answer_type 'weird': told by the answer (first: 8)",
        "1 lines are not JSON and were left out (first: line 11)",
        "1 lines are not JSON objects and were left out (first: line 9)",
        "no open items: no open scores",
    ):
        assert line in warnings


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_other_encodings_are_read(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "p.jsonl"
    line = json.dumps(row(1, "Sjögren", "sjögren"), ensure_ascii=False)
    path.write_bytes((line + "\n").encode(encoding))
    found, warnings = warnings_of(path)
    assert found["open_exact"]["value"] == 100.0
    assert ("not UTF-8" in warnings) == (encoding == "cp1252")


def test_a_megabyte_answer_is_scored(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [row(1, "liver", "liver " * 200_000), row(2, "a", "b")])
    assert warnings_of(path)[0]["open_recall"]["value"] == 50.0


def test_truth_file_decides_and_unknown_and_missing_ids_are_counted(tmp_path: Path) -> None:
    truth = write(tmp_path / "t.jsonl", [row(at, "yes", "") for at in (1, 2, 3)])
    bare = [{"id": 1, "prediction": "yes"}, {"id": "2", "prediction": "no"}, {"id": 9, "text": "x"}]
    found, warnings = warnings_of(write(tmp_path / "p.jsonl", bare), truth=truth)
    assert (found["closed"]["value"], found["closed"]["n"]) == (50.0, 2)
    assert "1 ids are not in the truth file and were left out (first: 9)" in warnings
    assert "1 of 3 ids of the truth file have no prediction: not in n" in warnings


def test_truth_of_another_split_is_refused(tmp_path: Path) -> None:
    predictions = write(tmp_path / "p.jsonl", [row(at, "yes", "yes") for at in range(10)])
    other_ids = write(tmp_path / "a.jsonl", [row(at, "yes", "") for at in range(50, 60)])
    with pytest.raises(CloverError, match=r"none of the 10 prediction ids .* another split"):
        score_file(predictions, truth=other_ids)
    other = [{**row(at, "no", ""), "question": "Other?"} for at in range(10)]
    with pytest.raises(CloverError, match=r"10 of 10 questions differ .* another split"):
        score_file(predictions, truth=write(tmp_path / "b.jsonl", other))


def test_nothing_to_score_is_one_line(tmp_path: Path) -> None:
    empty = tmp_path / "p.jsonl"
    empty.write_text("", encoding="utf-8")
    for wrong in (5, None, "predictions.jsonl", {"id": "a"}):
        with pytest.raises(CloverError, match=r"items is a .*; give a list .* or a file's path to"):
            score(wrong)  # type: ignore[arg-type]
    with pytest.raises(CloverError, match="nothing can be scored: there are no prediction lines"):
        score_file(empty)
    with pytest.raises(CloverError, match="no file"):
        score_file(tmp_path / "absent.jsonl")
    with pytest.raises(CloverError, match="nothing can be scored: 1 items have no answer"):
        score([{"id": 1, "prediction": "yes"}])


def test_scoring_does_not_import_torch() -> None:
    code = (
        "import sys, clover;"
        "found = clover.score([{'id': 1, 'answer': 'yes', 'prediction': 'yes'}], 'strict');"
        "assert found['closed']['value'] == 100.0;"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_several_processes_give_the_scores_of_one(tmp_path: Path) -> None:
    path = write(tmp_path / "predictions.jsonl", many(1500, seed=4))
    train = write(tmp_path / "train.jsonl", [{**row, "id": f"t{row['id']}"} for row in many(90)])
    names = "strict,llava-med-pvqa,quilt"
    alone, together = (
        score_file(path, names, train=train, draws=50, workers=workers) for workers in (1, 2)
    )
    assert alone == together
    assert alone["strict"]["closed"]["n"] + alone["strict"]["open_f1"]["n"] == 1500
    assert num_workers(path) == 1  # too small a file for further processes
