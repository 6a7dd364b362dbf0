"""Bad prediction files through the command: one line each, and what can be scored is scored."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from clover.cli import main
from clover.core.errors import CloverError
from clover.evaluate.command import score

Row = dict[str, Any]


def rows(count: int = 24) -> list[Row]:
    return [
        {
            "id": at,
            "image": f"{at // 2}.png",
            "question": f"Question {at}?",
            "answer": "yes" if at % 2 else "Sjögren nodule",
            "prediction": "yes" if at % 2 else "Sjögren nodule",
        }
        for at in range(count)
    ]


def write(path: Path, lines: list[Row], encoding: str = "utf-8", end: str = "\n") -> Path:
    text = "".join(json.dumps(line, ensure_ascii=False) + end for line in lines)
    path.write_bytes(text.encode(encoding, "surrogatepass"))
    return path


def run(path: Path, *arguments: str | Path) -> Result:
    options = ["--draws", "20", "--protocol", "strict,llava-med,llava-med-batch,quilt", "--json"]
    return CliRunner().invoke(score, [str(path), *options, *map(str, arguments)])


def scored(path: Path, *arguments: str | Path) -> tuple[dict[str, Any], list[str]]:
    done = run(path, *arguments, "--per-item", path.parent / "items.jsonl")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found["strict"], done.stderr.splitlines()


def refused(path: Path, *arguments: str | Path) -> str:
    done = run(path, *arguments)
    assert isinstance(done.exception, CloverError)
    assert "\n" not in str(done.exception)
    return str(done.exception)


@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252"],
)
@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_any_usual_encoding_gives_the_same_scores(
    tmp_path: Path, encoding: str, ending: str
) -> None:
    path = write(tmp_path / "p.jsonl", rows(), encoding)
    if ending == ".csv":
        path = tmp_path / "p.csv"
        with path.open("w", encoding=encoding, newline="") as out:
            table = csv.DictWriter(out, list(rows()[0]))
            table.writeheader()
            table.writerows(rows())
    found, said = scored(path)
    assert (found["closed"]["value"], found["closed"]["n"]) == (100.0, 12)
    assert (found["open_exact"]["value"], found["open_exact"]["n"]) == (100.0, 12)
    assert len(said) == (encoding in ("latin-1", "cp1252"))


def test_lines_under_the_name_of_a_list_and_crlf_are_read(tmp_path: Path) -> None:
    found, said = scored(write(tmp_path / "p.json", rows(), end="\r\n"))
    assert (found["closed"]["n"], found["open_f1"]["n"], said) == (12, 12, [])


def test_each_oddity_is_one_line_and_the_rest_is_scored(tmp_path: Path) -> None:
    lines: list[Any] = rows()
    lines[0]["prediction"] = float("nan")
    lines[1]["answer"] = float("nan")
    lines[2]["prediction"] = ["a", "b"]
    lines[3]["answer"] = ["yes"]
    lines[4]["prediction"] = "nodule " * 150_000
    lines[5]["prediction"] = {"text": "yes"}
    lines[7]["id"] = None
    lines[9]["id"] = "half \ud800"
    lines.append(rows()[10])
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{torn\n" + "[" * 99_999)
    found, said = scored(path)
    # Closed: 12, less the one without an answer; the one that said an object is wrong.
    assert (found["closed"]["value"], found["closed"]["n"]) == (pytest.approx(100 * 10 / 11), 11)
    # Open: two said nothing that is text; the megabyte holds half of the truth's words.
    assert found["open_recall"]["value"] == pytest.approx(100 * (9 + 0.5) / 12)
    assert [line.partition(": ")[2] for line in said] == [
        "3 items have no prediction that is one text: scored as empty (first: 0)",
        "1 items have an answer that is not one text to compare with and were left out (first: 1)",
        "1 items have no id: numbered by their line (first: 8)",
        "1 items repeat an id and were left out: the first counts (first: 10)",
        "2 lines are not JSON and were left out (first: line 26)",
    ]


@pytest.mark.parametrize("kind", ["closed", "open"])
def test_without_closed_or_open_items_the_other_score_is_given(tmp_path: Path, kind: str) -> None:
    kept = [row for row in rows() if (row["answer"] == "yes") == (kind == "closed")]
    found, said = scored(write(tmp_path / "p.jsonl", kept))
    given, absent = ("closed", "open_f1") if kind == "closed" else ("open_f1", "closed")
    assert (found[given]["value"], found[given]["n"]) == (100.0, 12)
    assert found[absent] == {"value": None, "n": 0, "low": None, "high": None}
    assert len(said) == 1
    assert said[0].startswith("clover: no ")


def test_a_truth_file_in_part_or_of_another_split(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"id": r["id"], "text": r["prediction"]} for r in rows()])
    found, said = scored(path, "--truth", write(tmp_path / "part.jsonl", rows(10)))
    assert (found["closed"]["n"], found["open_f1"]["n"]) == (5, 5)
    assert said == ["clover: 14 ids are not in the truth file and were left out (first: 10)"]
    longer = write(tmp_path / "longer.jsonl", rows(30))
    assert scored(path, "--truth", longer)[1] == [
        "clover: 6 of 30 ids of the truth file have no prediction: not in n"
    ]
    others = [{**row, "id": row["id"] + 500} for row in rows()]
    assert "another split or set" in refused(path, "--truth", write(tmp_path / "o.jsonl", others))
    asked = write(tmp_path / "asked.jsonl", [{**row, "question": "Else?"} for row in rows()])
    whole = write(tmp_path / "whole.jsonl", rows())
    assert "24 of 24 questions differ" in refused(whole, "--truth", asked)


def test_a_prompt_around_the_question_is_the_same_question(tmp_path: Path) -> None:
    suffix = " Please choose from the following two options: [yes, no]"
    asked = [
        {
            "question_id": row["id"],
            "prompt": f"{row['question']}\n<image>{suffix}",
            "text": row["prediction"],
        }
        for row in rows()
    ]
    path, truth = write(tmp_path / "p.jsonl", asked), write(tmp_path / "t.jsonl", rows())
    found, said = scored(path, "--truth", truth)
    assert (found["closed"]["n"], said) == (12, [])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "there are no prediction lines"),
        ("bytes.jsonl", bytes(range(256)) * 20, "nothing can be scored"),
        ("object.json", b'{"a": 1}', "holds a JSON dict; a list of objects is needed"),
        ("torn.json", b'[{"id": 1', "is not JSON"),
        ("deep.json", b"[" * 99_999, "nested too deep"),
        ("head.csv", b"id,question,answer,prediction\n", "there are no prediction lines"),
    ],
)
def test_what_holds_nothing_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert message in refused(path)


def test_llava_med_s_truth_is_read_and_a_repeated_id_counts_once(tmp_path: Path) -> None:
    truth = [
        {
            "id": number,
            "image": f"{number}.jpg",
            "answer_type": kind,
            key: [
                {"from": "human", "value": f"{question}\n<image>"},
                {"from": "gpt", "value": answer},
            ],
        }
        for number, (kind, key, question, answer) in enumerate(
            [
                ("CLOSED", "conversations", "Is it benign?", "yes"),
                ("CLOSED", "conversatons", "Is it malignant?", "no"),
                ("OPEN", "conversations", "What is seen?", "a nevus"),
            ]
        )
    ]
    truth.append({**truth[0], "conversations": [{"from": "gpt", "value": "no"}]})
    answers = [
        {"question_id": 0, "prompt": "Is it benign?", "text": "Yes, it is."},
        {"question_id": 1, "prompt": "Is it malignant?", "text": "yes"},
        {"question_id": 2, "prompt": "What is seen?", "text": "a nevus"},
    ]
    path = write(tmp_path / "answers.jsonl", answers)
    (tmp_path / "test.json").write_text(json.dumps(truth))
    found, said = scored(path, "--truth", tmp_path / "test.json")
    assert found["closed"]["value"] == 50.0 and found["closed"]["n"] == 2
    assert found["open_recall"]["value"] == 100.0
    assert said == ["clover: 1 lines of the truth file repeat an id: the first counts (first: 0)"]


def test_a_list_in_latin_1_is_read_and_said(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(json.dumps(rows(), ensure_ascii=False).encode("latin-1"))
    found, said = scored(path)
    assert found["open_exact"]["value"] == 100.0
    assert said == ["clover: 1 files are not UTF-8 and were read as Windows-1252 (first: p.json)"]


def test_a_header_that_json_cannot_hold_costs_no_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"header": {"model": "m", "decoding": {"temperature": NaN, "top": [1e999, -Infinity]}}}\n'
        '{"id": 1, "question": "Fat?", "answer": "yes", "prediction": "yes"}\n'
    )
    with pytest.raises(SystemExit) as stop:
        main(["score", str(path), "--json", "--protocol", "strict,quilt"])
    said = capsys.readouterr()
    found = json.loads(said.out)["strict"]
    assert stop.value.code == 0 and found["closed"]["value"] == 100
    decoding = {"temperature": None, "top": [None, None]}
    assert found["details"]["header"] == {"model": "m", "decoding": decoding}
    (line,) = [line for line in said.err.splitlines() if "header" in line]
    assert line.endswith("the header holds NaN, Infinity, -Infinity: null in the scores")


@pytest.mark.parametrize("number", ["nan", "inf", "1e6", "-1"])
def test_trainable_parameters_that_mean_nothing_are_one_line(
    number: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": 1, "question": "Fat?", "answer": "yes", "prediction": "yes"}\n')
    with pytest.raises(SystemExit) as stop:
        main(["score", str(path), "--json", "--trainable", number])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "needs more than 1,000,000" in said and said.count("\n") == 1
