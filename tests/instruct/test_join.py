"""Joined questions keep every question once, with its answer in its place."""

from __future__ import annotations

from collections import Counter

from clover.core.record import Record
from clover.instruct.join import join_questions


def questions(images: int, each: int) -> list[Record]:
    return [
        Record(
            id=f"{image}#{number}",
            image=f"{image}.png",
            question=f"Question {number}?",
            answer=f"answer {number}",
            answer_type="open",
        )
        for image in range(images)
        for number in range(each)
    ]


def test_every_question_is_asked_exactly_once() -> None:
    records = questions(images=20, each=10)
    joined = join_questions(records, share=0.5, seed=3)
    asked = Counter(part for record in joined for part in record.id.split("+"))
    assert asked == Counter(record.id for record in records)
    assert {record.id.count("+") for record in joined} == {0, 2}


def test_answers_stand_in_the_order_of_the_questions_and_share_an_image() -> None:
    for record in join_questions(questions(images=5, each=9), share=1.0):
        numbers = [part.split("#")[1] for part in record.id.split("+")]
        assert record.answer == "; ".join(f"answer {number}" for number in numbers)
        assert {part.split("#")[0] for part in record.id.split("+")} == {
            (record.image or "").removesuffix(".png")
        }


def test_nothing_is_joined_at_share_nought_and_too_few_are_left_alone() -> None:
    assert len(join_questions(questions(4, 6), share=0.0, seed=1)) == 24
    assert len(join_questions(questions(4, 2), share=1.0, seed=1)) == 8
