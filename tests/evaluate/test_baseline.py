"""Baselines that see colour, given features, or nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clover.core.errors import CloverError
from clover.core.record import Record
from clover.evaluate.baseline import (
    colour_only_baseline,
    fit_softmax,
    linear_probe_baseline,
    majority_baseline,
    question_only_baseline,
)
from clover.evaluate.score import score


def record(number: int, answer: str, question: str = "Which stain?", **more: str) -> Record:
    return Record.model_validate(
        {
            "id": str(number),
            "image": f"{number}.png",
            "question": question,
            "answer": answer,
            **more,
        }
    )


@pytest.fixture
def stained(tmp_path: Path) -> tuple[list[Record], list[Record], Path]:
    rng = np.random.default_rng(0)
    records = []
    for number in range(40):
        is_brown = number % 2 == 0
        colour = np.array([150, 100, 60] if is_brown else [220, 130, 190])
        pixels = np.clip(colour + rng.normal(0, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        records.append(record(number, "IHC" if is_brown else "H&E"))
    return records[:20], records[20:], tmp_path


def test_colour_alone_tells_stains_apart(
    stained: tuple[list[Record], list[Record], Path],
) -> None:
    train, test, folder = stained
    rows = colour_only_baseline(train, test, train_folder=folder)
    assert score(rows, draws=0)["open_exact"]["value"] == 100.0
    assert rows[0].keys() >= {"id", "image", "question", "answer", "prediction"}


def test_a_broken_image_is_named(stained: tuple[list[Record], list[Record], Path]) -> None:
    train, test, folder = stained
    (folder / "3.png").write_bytes(b"not a picture")
    with pytest.raises(CloverError, match=r"3\.png cannot be read as an image"):
        colour_only_baseline(train, test, train_folder=folder)


def test_probe_fits_each_question_form_by_itself() -> None:
    features = np.array([[0.0], [1.0], [0.0], [1.0]] * 5)
    organ = [record(at, ["lung", "colon"][at % 2], "Organ?") for at in range(2)]
    grade = [record(at, ["yes", "no"][at % 2], "Malignant?", form="m") for at in range(2, 4)]
    other = [record(5, "new", "Never asked?")]
    train = [entry for _ in range(5) for entry in organ + grade]
    rows = linear_probe_baseline(
        features, np.array([[1.0], [0.0], [0.0]]), train=train, test=[*organ, *other]
    )
    assert [row["prediction"] for row in rows[:2]] == ["colon", "lung"]
    assert rows[2]["prediction"] in ("lung", "colon")  # falls back to the commonest open answer


def test_probe_refuses_features_that_do_not_fit() -> None:
    with pytest.raises(CloverError, match="one row a record"):
        linear_probe_baseline(np.zeros((2, 3)), np.zeros((1, 3)), train=[], test=[record(1, "x")])
    with pytest.raises(CloverError, match="NaN"):
        linear_probe_baseline(
            np.full((1, 3), np.nan), np.zeros((1, 3)), train=[record(1, "x")], test=[record(1, "x")]
        )


def test_softmax_is_at_the_minimum_of_its_loss() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 3))
    labels = [["a", "b", "c"][at] for at in rng.integers(0, 3, 60)]
    found = fit_softmax(features, labels)
    logits = features @ found.weights + found.biases
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    hot = np.array([[label == name for name in found.names] for label in labels], dtype=float)
    slope = features.T @ (chances - hot) + found.weights
    assert abs(slope).max() < 1e-2


def test_majority_and_question_only_baselines() -> None:
    train = [record(1, "liver", "Organ?"), record(2, "liver", "Organ?"), record(3, "PAS")]
    train += [record(4, "no", "Tumour?"), record(5, "no", "Tumour?"), record(6, "yes", "Fat?")]
    test = [record(7, "PAS"), record(8, "yes", "Fat?"), record(9, "x", "New?")]
    assert [row["prediction"] for row in majority_baseline(train, test)] == ["liver", "no", "liver"]
    assert [row["prediction"] for row in question_only_baseline(train, test)] == [
        "PAS",
        "yes",
        "liver",
    ]
