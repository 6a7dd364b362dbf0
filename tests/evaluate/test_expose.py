"""Made predictions of each kind are exposed by name; a model that looks is not charged."""

from __future__ import annotations

import itertools
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clover.evaluate.expose import chance_gain
from clover.evaluate.score import score, score_file

Row = dict[str, Any]
ORGANS = ["colon", "liver", "kidney", "lung"]
QUESTIONS = ["Is there necrosis?", "Is fibrosis present?", "Are there mitoses?"]


def truths(images: int = 60, seed: int = 0) -> list[Row]:
    rng = random.Random(seed)
    rows = []
    for image in range(images):
        asked = [("Which organ is this?", rng.choice(ORGANS))]
        asked += [(question, rng.choice(["yes", "no"])) for question in QUESTIONS]
        for place, (question, answer) in enumerate(asked):
            row = {"id": f"{image}-{place}", "image": f"{image}.png", "question": question}
            rows.append({**row, "answer": answer})
    return rows


def charges(rows: list[Row]) -> dict[str, str]:
    found = score(rows, draws=0)["details"]["exposed"]["charges"]
    return {charge["name"]: charge["sentence"] for charge in found}


def test_a_good_model_and_a_mediocre_one_are_not_charged() -> None:
    rng = random.Random(1)
    rows = truths()
    assert charges([{**row, "prediction": row["answer"]} for row in rows]) == {}
    mediocre = [
        {
            **row,
            "prediction": row["answer"]
            if rng.random() < 0.4
            else rng.choice(ORGANS if row["answer"] in ORGANS else ["yes", "no"]),
        }
        for row in rows
    ]
    assert charges(mediocre) == {}


def test_a_yes_sayer_is_named_and_a_good_model_of_a_lopsided_set_is_not() -> None:
    rows = truths()
    assert "yes-sayer" in charges([{**row, "prediction": "Yes, it is"} for row in rows])
    assert "no-sayer" in charges([{**row, "prediction": "no"} for row in rows])
    # 90 % of the truths are yes: a good model says yes nearly always, and rightly.
    lopsided = [
        {"id": at, "question": f"Is it {at}?", "answer": "yes" if at % 10 else "no"}
        for at in range(400)
    ]
    assert charges([{**row, "prediction": row["answer"]} for row in lopsided]) == {}


@pytest.mark.parametrize("kind", ["constant", "a word a question", "sampled"])
def test_a_blind_model_is_named_however_it_guesses(kind: str) -> None:
    rng = random.Random(2)

    def guess(row: Row) -> str:
        if kind == "constant":
            return "liver"
        options = ORGANS if "organ" in row["question"] else ["yes", "no"]
        return options[len(row["question"]) % 2] if kind != "sampled" else rng.choice(options)

    rows = truths(images=2000 if kind == "sampled" else 60)
    assert "blind" in charges([{**row, "prediction": guess(row)} for row in rows])


def test_too_few_questions_charge_nobody() -> None:
    rows = [{**row, "prediction": "yes"} for row in truths(images=4)]
    found = score(rows, draws=0)["details"]["exposed"]
    assert found["charges"] == []
    assert [line.split(" ")[0] for line in found["not_tried"]] == ["yes-sayer", "blind", "copier"]


def test_chance_and_its_spread_are_those_of_all_dealings() -> None:
    said, true = [0, 0, 1, 2, 1], [0, 1, 1, 2, 0]
    found = chance_gain(np.zeros(5, np.int64), np.array(said), np.array(true))
    hits = [
        sum(a == b for a, b in zip(dealt, true, strict=True))
        for dealt in itertools.permutations(said)
    ]
    assert found["right"] == 60.0
    assert found["chance"] == pytest.approx(100 * statistics.mean(hits) / 5)
    half = 1.96 * statistics.pstdev(hits)
    assert found["high"] - found["gain"] == pytest.approx(100 * half / 5)


def test_where_nearly_all_images_have_one_answer_nobody_is_blind() -> None:
    rows = [
        {"id": at, "question": "Is it?", "answer": "no" if at % 40 else "yes", "prediction": "no"}
        for at in range(400)
    ]
    found = score(rows, draws=0)["details"]["exposed"]
    assert found["looks"]["gain"] == 0.0
    assert found["looks"]["room"] == pytest.approx(100 * (1 - 0.025**2 - 0.975**2))
    assert found["charges"] == []


def test_questions_with_one_truth_alone_say_nothing_about_looking() -> None:
    found = chance_gain(np.array([1, 1, 2, 2]), np.array([5, 5, 6, 6]), np.array([5, 5, 6, 7]))
    assert found["n"] == 2
    assert found["gain"] == 0.0


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def copied(path: Path, rows: list[Row], train: Path) -> list[str]:
    found = score_file(write(path, rows), train=train, draws=0)["strict"]["details"]["exposed"]
    return [charge["sentence"] for charge in found["charges"] if charge["name"] == "copier"]


@pytest.mark.parametrize("lookup", ["commonest", "first", "last"])
def test_a_copier_of_training_answers_is_named(tmp_path: Path, lookup: str) -> None:
    rng = random.Random(3)
    training = [
        {"question": f"What is at place {at % 200}?", "answer": rng.choice(ORGANS)}
        for at in range(1000)
    ]
    train = write(tmp_path / "train.jsonl", training)
    rows, looked_up = [], []
    for at in range(200):
        question = f"What is at place {at}?"
        given = [row["answer"] for row in training if row["question"] == question]
        answer = {"first": given[0], "last": given[-1], "commonest": statistics.mode(given)}[lookup]
        row = {"id": at, "question": question, "answer": rng.choice(ORGANS)}
        looked_up.append({**row, "prediction": answer})
        rows.append({**row, "prediction": row["answer"] if rng.random() < 0.5 else "spleen"})
    (sentence,) = copied(tmp_path / "copier.jsonl", looked_up, train)
    assert sentence.startswith(f"copier from train: gives the {lookup} training answer")
    assert copied(tmp_path / "good.jsonl", rows, train) == []


def test_whole_training_sentences_betray_a_copier_but_not_a_pattern(tmp_path: Path) -> None:
    rng = random.Random(4)
    words = [f"word{at}" for at in range(300)]
    sentences = [" ".join(rng.choices(words, k=8)) for _ in range(120)]
    train = write(
        tmp_path / "train.jsonl",
        [{"question": f"Describe {at}.", "answer": text} for at, text in enumerate(sentences)],
    )
    asked = [
        {"id": at, "question": f"What about {at}?", "answer": " ".join(rng.choices(words, k=8))}
        for at in range(60)
    ]
    copier = [{**row, "prediction": rng.choice(sentences)} for row in asked]
    assert "word for word" in copied(tmp_path / "copier.jsonl", copier, train)[0]
    own = [{**row, "prediction": " ".join(rng.choices(words, k=8))} for row in asked]
    assert copied(tmp_path / "own.jsonl", own, train) == []
    # Where the truths are training sentences too, a wrong one of them is no theft.
    pattern = [{**row, "answer": rng.choice(sentences)} for row in copier]
    assert copied(tmp_path / "pattern.jsonl", pattern, train) == []


def test_the_command_says_it_in_a_sentence_and_in_json(tmp_path: Path) -> None:
    rows = [{**row, "prediction": "yes"} for row in truths()]
    path, train = write(tmp_path / "p.jsonl", rows), write(tmp_path / "t.jsonl", truths(seed=9))
    command = [sys.executable, "-m", "clover.cli", "score", str(path), "--train", str(train)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "exposed as yes-sayer: says yes to 100.0% of the" in done.stdout
    assert "exposed as blind: right in" in done.stdout
    told = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    exposed = json.loads(told.stdout)["strict"]["details"]["exposed"]
    assert [charge["name"] for charge in exposed["charges"]] == ["yes-sayer", "blind"]
    good = write(tmp_path / "g.jsonl", [{**row, "prediction": row["answer"]} for row in truths()])
    command[4] = str(good)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "not exposed as blind, a yes-sayer, a no-sayer or a copier" in done.stdout
