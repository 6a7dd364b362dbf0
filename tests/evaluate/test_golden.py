"""Every rule of every published scorer, against what those scorers returned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clover.evaluate.protocol import DROPPED, PROTOCOLS, Item
from clover.evaluate.protocol.llava_med import normal
from clover.evaluate.protocol.pathvqa import bleu

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared/reference/metrics_golden.json"
pytestmark = pytest.mark.skipif(not GOLDEN.exists(), reason="no ../shared/reference")


def rows() -> list[tuple[dict[str, Any], Item]]:
    if not GOLDEN.exists():
        return []
    found = json.loads(GOLDEN.read_text(encoding="utf-8"))["items"]
    return [
        (
            row,
            Item(
                id=row["id"],
                question=row["question"],
                answer=row["answer"],
                is_closed=row["answer_type"] == "CLOSED",
                prediction=row["pred"],
                # The golden run of quilt_eval was made with --quilt for the QUILT-VQA items.
                yes_no_answer=row["yes_no_answer"],
            ),
        )
        for row in found
    ]


def test_all_259_items_are_there() -> None:
    assert len(rows()) == 259


def test_normal_forms_are_the_published_ones() -> None:
    for row, item in rows():
        assert normal(item.prediction) == row["llava_med_norm"]["pred"], row["id"]
        assert normal(item.answer) == row["llava_med_norm"]["answer"], row["id"]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("llava-med", "llava_med_run_eval"),
        ("llava-med-batch", "llava_med_run_eval_batch"),
        ("llava-med-pvqa", "llava_med_run_eval_pvqa"),
        ("quilt", "quilt_eval"),
    ],
)
def test_closed_ratings_are_the_published_ones(name: str, key: str) -> None:
    for row, item in rows():
        if item.is_closed:
            expected = row["closed"][key]
            rating = PROTOCOLS[name].rate(item).closed
            assert rating == (DROPPED if expected == "dropped" else expected), row["id"]


def test_word_scores_of_closed_items_are_the_published_ones() -> None:
    for row, item in rows():
        if item.is_closed:
            rating = PROTOCOLS["llava-med-batch"].rate(item)
            found = (rating.recall, rating.precision, rating.f1)
            keys = ("recall_closed", "precision_closed", "f1_closed")
            assert found == tuple(row["closed"][key] for key in keys), row["id"]
            assert PROTOCOLS["quilt"].rate(item).label == row["closed"]["quilt_pred_label"]


@pytest.mark.parametrize("name", ["llava-med", "llava-med-batch", "llava-med-pvqa", "quilt"])
def test_open_ratings_are_the_published_ones(name: str) -> None:
    for row, item in rows():
        if not item.is_closed:
            rating = PROTOCOLS[name].rate(item)
            expected = row["llava_med"]
            assert rating.recall == expected["recall"], row["id"]
            assert rating.precision == expected["precision"], row["id"]
            assert rating.f1 == expected["f1"], row["id"]
            assert rating.exact == expected["exact_match"], row["id"]


def test_bleu_and_substring_accuracy_are_the_published_ones() -> None:
    extras = PROTOCOLS["llava-med-batch"].extras
    assert extras is not None
    for row, item in rows():
        if not item.is_closed:
            found, expected = extras(item), row["llava_med"]
            assert found["open_accuracy"] == expected["open_accuracy_substring"], row["id"]
            for key in ("bleu", "bleu_1", "bleu_2", "bleu_3"):
                assert found[key] == pytest.approx(expected[key], rel=1e-9, abs=0), row["id"]


def test_pathvqa_official_is_the_published_script() -> None:
    for row, item in rows():
        rating, expected = PROTOCOLS["pathvqa-official"].rate(item), row["pathvqa_official"]
        for found, key in ((rating.f1, "f1"), (rating.exact, "exact_match")):
            value = expected[key]
            assert found == (0 if isinstance(value, str) else value), row["id"]
        for order in (1, 2, 3, 4):
            value = expected[f"bleu_n{order}_uniform"]
            found = bleu(item.prediction, item.answer, order)
            if isinstance(value, str):
                assert found is None, row["id"]
            else:
                assert found == pytest.approx(value, rel=1e-9), row["id"]
