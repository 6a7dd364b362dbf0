"""`clover score`, run as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import Tiny

LINES = [
    {"header": {"model": "a"}},
    {"id": 1, "question": "Is it?", "answer": "no", "prediction": "normal", "image": "a.png"},
    {"id": 2, "question": "Is it?", "answer": "yes", "prediction": "yes", "image": "b.png"},
    {"id": 3, "question": "What?", "answer": "fat cells", "prediction": "fat", "image": "b.png"},
    {"id": 4, "question": "Is it?", "answer": "no", "prediction": "Yes", "image": "c.png"},
]


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    return path


def clover(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clover.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_json_has_the_promised_keys(predictions: Path) -> None:
    done = clover("score", predictions, "--protocol", "strict,llava-med,quilt", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == ["strict", "llava-med", "quilt"]
    for scores in found.values():
        for key in ("closed", "open_recall", "open_precision", "open_f1", "open_exact"):
            assert scores[key].keys() == {"value", "n", "low", "high"}
    assert found["strict"]["closed"]["value"] == pytest.approx(100 / 3)
    assert found["llava-med"]["closed"]["value"] == pytest.approx(200 / 3)
    assert found["strict"]["details"]["header"] == {"model": "a"}


def test_per_item_file_has_one_line_an_item_and_protocol(predictions: Path, tmp_path: Path) -> None:
    out = tmp_path / "items.jsonl"
    names = "strict,llava-med-pvqa"
    assert clover("score", predictions, "--protocol", names, "--per-item", out).returncode == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 8
    assert list(rows[0])[:7] == ["id", "protocol", "closed", "recall", "precision", "f1", "exact"]
    by_key = {(line["id"], line["protocol"]): line for line in rows}
    assert by_key[4, "llava-med-pvqa"]["closed"] == "dropped"
    assert by_key[1, "strict"]["closed"] == 0.0
    assert by_key[1, "strict"]["recall"] is None
    assert by_key[3, "strict"]["closed"] is None
    assert by_key[3, "strict"]["recall"] == 0.5


def test_table_names_value_interval_n_and_baselines(predictions: Path) -> None:
    done = clover("score", predictions, "--against", predictions, "--trainable", "187e6")
    assert done.returncode == 0, done.stderr
    for words in ("closed accuracy", "33.33 [", "n=3", "unparsed", "truth is yes: 33.33%"):
        assert words in done.stdout
    assert "not for diagnosis" in done.stdout
    assert "McNemar p" in done.stdout
    assert "log10" in done.stdout


def test_two_files_are_compared_in_pairs(tmp_path: Path) -> None:
    # Closed: 8 right here alone, 1 there alone: p = 2 (1 + 9) / 2^9 = 0.0390625.
    ours, theirs = [], []
    for at in range(30):
        line = {"id": at, "question": f"Q{at}?", "answer": "yes", "image": f"{at}.png"}
        ours.append({**line, "prediction": "no" if at == 0 else "yes"})
        theirs.append({**line, "prediction": "no" if 1 <= at <= 8 else "yes"})
    theirs.append({**theirs[0], "id": "only here"})
    paths = []
    for name, lines in (("ours", ours), ("theirs", theirs)):
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))
    done = clover("score", *paths, "--json")
    assert done.returncode == 0, done.stderr
    closed = json.loads(done.stdout)["strict"]["against"]["closed"]
    assert closed["mcnemar"]["p_value"] == pytest.approx(0.0390625)
    assert (closed["mcnemar"]["only_a"], closed["mcnemar"]["only_b"]) == (8, 1)
    assert closed["difference"] == pytest.approx(100 * 7 / 30)
    assert closed["low"] > 0
    assert closed["p_value"] < 0.05
    table = clover("score", *paths).stdout
    (row,) = [line for line in table.splitlines() if line.split()[2:3] == ["strict"]][:1]
    assert row.split()[-5:] == ["0.0391", "8", "/", "1", "30"]
    assert "30 items are in both files" in table
    other = tmp_path / "other.jsonl"
    other.write_text(
        "".join(json.dumps({**line, "question": "?", "answer": "no"}) + "\n" for line in ours)
    )
    refused = clover("score", paths[0], other)
    assert refused.returncode == 2
    assert "30 of the 30 shared ids have another question and another truth" in refused.stderr
    # The same the other way round, and with --against.
    back = json.loads(clover("score", paths[1], "--against", paths[0], "--json").stdout)
    assert back["strict"]["against"]["closed"]["difference"] == -closed["difference"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.jsonl"], "no file absent.jsonl"),
        (["{file}", "--protocol", "stict"], "no protocol 'stict'; did you mean 'strict'?"),
        (["{file}", "--trainable", "187"], "more than 1,000,000"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    predictions: Path, arguments: list[str], message: str
) -> None:
    done = clover("score", *(part.format(file=predictions) for part in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_help_has_an_example() -> None:
    assert "Example: clover score" in clover("score", "--help").stdout


def test_a_small_bridge_is_evaluated_and_what_was_set_aside_is_said(
    tiny: Tiny, tmp_path: Path
) -> None:
    from clover.tune.run import tune

    cache, odd = tmp_path / "cache", tmp_path / "odd.jsonl"
    steps = tiny.recipe.tune.model_copy(update={"steps": 1})
    recipe = tiny.recipe.model_copy(update={"tune": steps})
    paths = {"out": tmp_path / "model", "run": tmp_path / "run", "cache": cache}
    tune(recipe, instructions=tiny.instructions, **paths)
    rows = [json.loads(line) for line in tiny.instructions.read_text().splitlines()[:4]]
    rows[1]["answer"] = "it may well be liver"
    rows[2]["question"] = ""
    odd.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = clover(
        *("evaluate", tmp_path / "model", "--data", odd, "--out", tmp_path / "e"),
        *("--images", tiny.instructions.parent, "--features", cache),
    )
    assert done.returncode == 0, done.stderr
    assert "2 set aside" in done.stdout
    assert "1 closed question answered with prose" in done.stdout
    assert "1 empty question" in done.stdout
    # Below a million trainable parameters the paper's figure is a dash, not an error.
    (divided,) = [line for line in done.stdout.splitlines() if "/ log10(millions)" in line]
    assert divided.split()[2:] == ["-", "-"]
    assert len((tmp_path / "e" / "rejected.jsonl").read_text().splitlines()) == 2
