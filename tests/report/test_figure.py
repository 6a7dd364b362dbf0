"""Numbers as text, and examples sorted."""

from __future__ import annotations

from typing import Any

import pytest

from clover.core.errors import CloverError
from clover.evaluate.score import score
from clover.report.example import judge
from clover.report.figure import decimal, dollars, duration, parameters, signed


def test_numbers_as_text() -> None:
    assert (decimal(1234.56), decimal(-0.04), decimal(-3.21), decimal(float("nan"))) == (
        "1,234.6",
        "0.0",
        "−3.2",
        "–",
    )
    assert (signed(3.2), signed(-3.2), signed(0.01), signed(None)) == ("+3.2", "−3.2", "0.0", "–")
    assert (duration(48.31), duration(492), duration(11_100)) == (
        "48.3 s",
        "8 min 12 s",
        "3 h 05 min",
    )
    assert (dollars(0), dollars(0.0042), dollars(12.3), dollars("x")) == (
        "$0",
        "$0.0042",
        "$12.30",
        "–",
    )
    assert (parameters(9_412_224), parameters(None)) == ("9.41 M", "–")


@pytest.mark.parametrize(
    ("kind", "answer", "prediction", "expected"),
    [
        ("closed", "yes", "Yes, there is.", "right"),
        ("closed", "no", "Yes, there is no doubt.", "wrong"),
        ("closed", "no", "perhaps", "wrong"),
        ("open", "colonic mucosa", "Mucosa, colonic.", "right"),
        ("open", "colonic mucosa", "gastric mucosa", "part"),
        ("open", "liver", "", "wrong"),
        ("open", "", "liver", "wrong"),
        ("open", "liver", None, "wrong"),
    ],
)
def test_an_example_is_sorted_by_the_words_of_the_truth(
    kind: str, answer: str, prediction: str | None, expected: str
) -> None:
    row = {"answer_type": kind, "answer": answer, "prediction": prediction}
    assert judge(row).kind == expected


ODD: list[dict[str, Any]] = [
    {"answer": "The image shows a tumour, so yes.", "yes_no_answer": "yes", "prediction": "yes"},
    {"answer": "A tumour, no doubt.", "yes_no_answer": "yes", "prediction": "No."},
    {"answer": "Well, no.", "prediction": "no"},
    {"answer": "left", "prediction": "left"},
    {"gold": "yes", "pred": "Yes"},
    {"label": "liver", "predicted": "the liver"},
    {"question_ans": "No", "prediction": False},
    {"answer": 3, "prediction": 3},
    {"answer": ["fat"], "prediction": ["fat", "liver"]},
    {"answer": ["fat", "liver"], "prediction": "fat"},
    {"answer": "a cell of the liver", "response": "liver cell"},
    {"answer": None, "prediction": "yes"},
    {"answer": "", "prediction": ""},
    {"answer": "yesterday", "prediction": "yes"},
]


@pytest.mark.parametrize("kind", [None, "closed", "open", "yes/no", "CLOSED", "other", "maybe"])
@pytest.mark.parametrize("row", ODD)
def test_an_answer_is_judged_as_it_is_scored(row: dict[str, Any], kind: str | None) -> None:
    row = {"id": "1", "question": "What?", "answer_type": kind, **row}
    judged = judge(row)
    try:
        found = score([row], draws=0)
    except CloverError:
        assert judged.kind == "unscored"
        return
    value = found["closed" if judged.is_closed else "open_recall"]["value"]
    assert judged.is_closed == bool(found["details"]["num_closed"])
    assert value == (None if judged.share is None else pytest.approx(100 * judged.share))
