from collections import Counter, defaultdict

import numpy as np
import pytest

from clover.phantom.caption import write_caption
from clover.phantom.case import sample_case
from clover.phantom.question import CLOSED_FORMS, NAMING_FORMS, OPEN_FORMS, balance, write_questions
from clover.phantom.wording import language

CASES = [sample_case(0, "train", index) for index in range(1500)]


def test_captions_have_the_lengths_that_people_write() -> None:
    lengths = [len(write_caption(case).split()) for case in CASES]
    assert 20 <= np.median(lengths) <= 28
    assert np.quantile(lengths, 0.02) >= 8 and np.quantile(lengths, 0.98) <= 60


def test_no_two_captions_are_the_same_and_none_has_an_open_slot() -> None:
    captions = [write_caption(case) for case in CASES]
    assert len(set(captions)) == len(captions)
    assert not any("{" in text or "  " in text for text in captions)
    assert all(text[0].isupper() or not text[0].isalpha() for text in captions)


def test_a_caption_says_what_is_there_and_never_the_contrary() -> None:
    for case in CASES:
        text = write_caption(case).lower()
        for finding in ("necrosis", "fibrosis"):
            if getattr(case, finding):
                assert finding in text
            denied = [part for part in text.split(".") if part.strip().startswith("no ")]
            if getattr(case, finding):
                assert not any(finding in part for part in denied)
        if case.infiltrate != "none":
            assert case.infiltrate in text
        names = language()["tissues"][case.tissue]["names"]
        assert any(name.lower() in text for name in names)


def test_there_are_at_least_forty_clause_forms() -> None:
    words = language()["captions"]
    forms = [
        form
        for key in ("with_findings", "without_findings", "absent", "features", "remarks")
        for form in words[key]
    ]
    assert len(set(forms)) >= 40


@pytest.mark.parametrize("form", OPEN_FORMS + CLOSED_FORMS)
def test_every_form_has_at_least_four_wordings(form: str) -> None:
    assert len(set(language()["questions"][form])) >= 4


def test_yes_and_no_are_balanced_within_every_form() -> None:
    asked = balance(CASES, seed=0, split="train")
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for questions in asked.values():
        for item in questions:
            counts[item.form][item.answer] += 1
    for form in CLOSED_FORMS:
        assert set(counts[form]) == {"yes", "no"}
        assert abs(counts[form]["yes"] - counts[form]["no"]) <= 1
        assert counts[form].total() > len(CASES) * 0.7


def test_a_name_in_a_question_does_not_give_the_answer_away() -> None:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(4000):
        for item in write_questions(sample_case(8, "train", index)):
            if item.form == "is_tissue":
                for tissue, entry in language()["tissues"].items():
                    if any(name in item.question for name in entry["names"][:2]):
                        counts[tissue][item.answer] += 1
                        break
    assert len(counts) == 8
    for tissue, count in counts.items():
        assert 0.38 < count["yes"] / count.total() < 0.62, tissue


def test_answers_are_true_of_the_case() -> None:
    for case in CASES[:300]:
        answers = {item.form: item.answer for item in write_questions(case)}
        assert answers["tissue"] == case.tissue and answers["stain"] == case.stain
        assert answers["cellularity"] == case.cellularity
        assert answers["infiltrate"] == case.infiltrate
        for form in ("necrosis", "mitoses", "atypia", "fibrosis"):
            assert answers[form] == ("yes" if getattr(case, form) else "no")
        assert (answers["inflammation"] == "yes") == (case.infiltrate != "none")
        named = next(item for item in write_questions(case) if item.form == "is_stain").question
        asked = [
            stain
            for stain, entry in language()["stains"].items()
            if any(name in named for name in entry["ask"])
        ]
        assert (answers["is_stain"] == "yes") == (case.stain in asked)


def test_asked_both_ways_a_name_is_right_once_and_wrong_once() -> None:
    for index in range(20):
        case = sample_case(8, "train", index)
        once, twice = write_questions(case), write_questions(case, both_ways=True)
        assert twice[: len(once)] == once
        for form in NAMING_FORMS:
            pair = [item for item in twice if item.form == form]
            assert sorted(item.answer for item in pair) == ["no", "yes"]
            assert pair[0].question != pair[1].question
