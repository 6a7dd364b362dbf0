"""Questions with known answers, and the balance of yes and no within each form."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from clover.phantom.case import STAINS, TISSUES, Case, generator
from clover.phantom.wording import language, pick

OPEN_FORMS = ("tissue", "stain", "cellularity", "infiltrate")
CLOSED_FORMS = (
    "necrosis",
    "mitoses",
    "atypia",
    "fibrosis",
    "inflammation",
    "is_stain",
    "is_tissue",
)
NAMING_FORMS = ("is_stain", "is_tissue")
"""Closed questions that name something: only question and image together have an answer."""


@dataclass(frozen=True)
class Question:
    """One question about one image."""

    number: int
    """Its place among the image's questions; the same form always has the same numbers."""
    form: str
    question: str
    answer: str
    answer_type: Literal["open", "closed"]


def write_questions(case: Case, *, both_ways: bool = False) -> list[Question]:
    """Write every question that can be asked of a case, in one of its wordings each.

    Args:
        case: What is true.
        both_ways: Ask whether it is a named stain or tissue twice, with a right and a wrong name:
            a model then learns to read the name, where the image alone no longer tells it anything.
    """
    rng = case.generator("question")
    forms = language()["questions"]
    asked: list[Question] = []
    for form in OPEN_FORMS:
        answer = str(getattr(case, form))
        asked.append(Question(len(asked), form, pick(rng, forms[form]), answer, "open"))
    for form in CLOSED_FORMS:
        text, is_true = _closed(case, form, pick(rng, forms[form]), rng)
        answer = "yes" if is_true else "no"
        asked.append(Question(len(asked), form, text, answer, "closed"))
    if both_ways:
        for form in NAMING_FORMS:
            (first,) = (item.answer for item in asked if item.form == form)
            text = _naming(case, form, pick(rng, forms[form]), first == "no", rng)
            answer = "yes" if first == "no" else "no"
            asked.append(Question(len(asked), form, text, answer, "closed"))
    return asked


def _closed(case: Case, form: str, text: str, rng: np.random.Generator) -> tuple[str, bool]:
    """Return a yes/no question's text and whether the answer is yes."""
    if form == "inflammation":
        return text, case.infiltrate != "none"
    if form in NAMING_FORMS:
        is_true = bool(rng.random() < 0.5)
        return _naming(case, form, text, is_true, rng), is_true
    return text, bool(getattr(case, form))


def _naming(case: Case, form: str, text: str, is_true: bool, rng: np.random.Generator) -> str:
    """Return a question that names a stain or a tissue, the right one or another."""
    truth, known = (case.stain, STAINS) if form == "is_stain" else (case.tissue, TISSUES)
    named = truth if is_true else pick(rng, [item for item in known if item != truth])
    group = language()["stains" if form == "is_stain" else "tissues"][named]
    name = pick(rng, group["ask" if form == "is_stain" else "names"][:2])
    return text.format(stain=name, tissue=name)


def balance(
    cases: Iterable[Case], *, seed: int, split: str, both_ways: bool = False
) -> dict[int, list[Question]]:
    """Choose which questions a set asks, so that yes and no differ by one at most in each form.

    Returns:
        The questions of each image, by its index. Open questions are all kept.
    """
    chosen: dict[int, list[Question]] = {}
    closed: dict[tuple[str, str], list[tuple[int, Question]]] = defaultdict(list)
    for case in cases:
        questions = write_questions(case, both_ways=both_ways)
        chosen[case.index] = [item for item in questions if item.answer_type == "open"]
        for item in questions:
            if item.answer_type == "closed":
                closed[item.form, item.answer].append((case.index, item))
    for number, form in enumerate(CLOSED_FORMS):
        # A stream that no image uses: the name is not one a split can have.
        rng = generator(seed, f"{split}/balance", number, "question")
        yes, no = closed[form, "yes"], closed[form, "no"]
        keep = min(len(yes), len(no))
        for answers in (yes, no):
            extra = 1 if len(answers) > keep else 0
            for place in sorted(rng.permutation(len(answers))[: keep + extra].tolist()):
                index, item = answers[place]
                chosen[index].append(item)
    for questions in chosen.values():
        questions.sort(key=lambda item: item.number)
    return chosen
