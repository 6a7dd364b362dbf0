"""Worked examples: one for each frequent answer, spelt as the bridge spells, well apart."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from clover.core.config import PromptConfig
from clover.core.errors import CloverError
from clover.core.record import Record
from clover.language.prompt import Prompt
from clover.model import load
from clover.tune.example import Example, choose_examples, write_examples
from clover.tune.run import tune
from tiny import TISSUES, Tiny, tiny_recipe


def asked(question: str, answer: str, times: int, *, kind: str = "open") -> list[Record]:
    return [
        Record(id=f"{question}{answer}{i}", question=question, answer=answer, answer_type=kind)
        for i in range(times)
    ]


RECORDS = [
    *asked("Which organ?", "lung", 9),
    *asked("Which organ?", "colon", 8),
    *asked("What is seen?", "squamous cell carcinoma", 7),
    *asked("What is seen?", "adenocarcinoma", 6),
    *asked("What is seen?", "a very long description of all that there is", 50),
    *asked("Is it benign?", "yes", 5, kind="closed"),
    *asked("Is it benign?", "no", 4, kind="closed"),
    *asked("Is there necrosis?", "no", 3, kind="closed"),
    *asked("What does {image} mean?", "odd", 40),
]


def fits(answer: str) -> bool:
    return len(answer.split()) <= 4


def test_one_example_for_each_frequent_answer_and_a_quarter_closed() -> None:
    found = choose_examples(RECORDS, 12, fits=fits)
    answers = [example.answer for example in found]
    assert sorted(answers) == [
        "adenocarcinoma",
        "colon",
        "lung",
        "no",
        "no",
        "squamous cell carcinoma",
        "yes",
    ]
    # The second no asks something else; forms alternate; closed ones do not stand together.
    assert {e.question for e in found if e.answer in ("yes", "no")} == {
        "Is it benign?",
        "Is there necrosis?",
    }
    questions = [example.question for example in found]
    assert all(one != next_one for one, next_one in pairwise(questions))


def test_the_rarest_answers_are_left_out_first() -> None:
    found = choose_examples(RECORDS, 4, fits=fits)
    assert {e.answer for e in found} == {"lung", "colon", "squamous cell carcinoma", "no"}


def test_examples_are_laid_out_as_the_turn_itself() -> None:
    config = PromptConfig(
        template="<s>{examples}<user>\n{image} {question}<end>\n<bot>\n", answer_end="<end>"
    )
    written = write_examples(
        config,
        [Example("Which organ?", "lung")],
        spelt=lambda text: f" {text} - -",
    )
    assert written.template == (
        "<s><user>\n lung - - Which organ?<end>\n<bot>\nlung<end>\n"
        "<user>\n{image} {question}<end>\n<bot>\n"
    )
    # Until stage 2 has written them, nothing stands there.
    assert Prompt.from_config(config).before_image == "<s><user>\n"


def tuned(tiny: Tiny, out: Path, *, template: str) -> Path:
    recipe = tiny_recipe(tiny.folder, tune={"steps": 1, "worked_examples": 3})
    prompt = recipe.prompt.model_copy(update={"template": template})
    tune(
        recipe.model_copy(update={"prompt": prompt}),
        instructions=tiny.instructions,
        out=out / "model",
        run=out / "run",
        cache=tiny.folder / "cache",
    )
    return out / "model"


def test_stage_2_keeps_its_examples_in_the_model_folder(tiny: Tiny, tmp_path: Path) -> None:
    folder = tuned(tiny, tmp_path, template="{examples}<user> {image} {question} <assistant>")
    template = load(folder).recipe.prompt.template
    assert template.count("<user>") == 4
    assert template.endswith("<user> {image} {question} <assistant>")
    assert all(f"<assistant>{tissue}" in template for tissue in TISSUES)


def test_a_template_without_a_place_says_where_it_belongs(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(CloverError, match=r"write {examples} before its first turn"):
        tuned(tiny, tmp_path, template="<user> {image} {question} <assistant>")
