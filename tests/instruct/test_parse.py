"""Replies as models write them, read as pairs."""

from __future__ import annotations

from pathlib import Path

import pytest

from clover.core.errors import CloverError
from clover.instruct.parse import parse_pairs
from clover.instruct.prompt import build_request, known_prompts, load_prompt

WANTED = [("What is seen?", "Fat."), ("Is it liver?", "Yes")]


@pytest.mark.parametrize(
    "reply",
    [
        'question: "What is seen?"\nanswer: "Fat."\nquestion: "Is it liver?"\nanswer: "Yes"',
        "Question: What is seen?\nAnswer: Fat.\n\nQuestion: Is it liver?\nAnswer: Yes",
        "1. **Question:** What is seen?\n   **Answer:** Fat.\n2. **Question:** Is it liver?\n"
        "   **Answer:** Yes",
        "Q: What is seen?\nA: Fat.\nQ: Is it liver?\nA: Yes",
        "Q1: What is seen?\nA1: Fat.\nQ2: Is it liver?\nA2: Yes",
        "question: “What is seen?”\r\nanswer: “Fat.”\r\nquestion: “Is it liver?”\r\nanswer: “Yes”",
        "Here you are:\n```\nquestion: What is seen?\nanswer: Fat.\nquestion: Is it liver?\n"
        "answer: Yes\n```",
        '{"pairs": [{"question": "What is seen?", "answer": "Fat."}, '
        '{"question": "Is it liver?", "answer": "Yes"}]}',
        '```json\n[{"question": "What is seen?", "answer": "Fat."}, '
        '{"question": "Is it liver?", "answer": "Yes"}]\n```',
    ],
)
def test_the_forms_that_models_use_are_understood(reply: str) -> None:
    pairs = parse_pairs(reply)
    assert [(p.question, p.answer) for p in pairs] == WANTED
    assert [p.answer_type for p in pairs] == ["open", "closed"]


def test_answers_over_several_lines_stay_whole() -> None:
    pairs = parse_pairs("question: What is seen?\nanswer: Fat\nand fibrosis.")
    assert pairs[0].answer == "Fat and fibrosis."


def test_what_was_cut_off_is_dropped_not_completed() -> None:
    text = 'question: "What is seen?"\nanswer: "Fat."\nquestion: "And?"\nanswer: "Some fib'
    assert len(parse_pairs(text, is_cut_off=True)) == 1
    cut = '{"pairs": [{"question": "What is seen?", "answer": "Fat."}, {"question": "And'
    assert [(p.question, p.answer) for p in parse_pairs(cut)] == WANTED[:1]


@pytest.mark.parametrize("reply", ["", "I cannot help with that.", "{}", "[1, 2]", "question: a?"])
def test_what_holds_no_pair_gives_none(reply: str) -> None:
    assert parse_pairs(reply) == []


def test_support_is_kept() -> None:
    reply = '{"pairs": [{"question": "a b c?", "answer": "d", "type": "open", "support": "e"}]}'
    assert parse_pairs(reply)[0].support == "e"


def test_every_prompt_that_comes_along_holds_its_own_example_to_its_format() -> None:
    assert known_prompts() == ["copied-v1", "plain-v1", "published-v1", "structured-v1"]
    for name in known_prompts():
        prompt = load_prompt(name)
        assert prompt.example is not None
        least, most = prompt.pairs
        assert least <= len(parse_pairs(prompt.example.answer)) <= most
        body = build_request(prompt, "A {caption} with braces.", model="m").body
        assert body["messages"][-1]["content"].count("A {caption} with braces.") == 1


def test_published_sampling_parameters() -> None:
    prompt = load_prompt("published-v1")
    assert (prompt.temperature, prompt.top_p, prompt.pairs) == (1.0, 1.0, (4, 5))


def test_the_key_covers_what_shapes_the_reply() -> None:
    prompt = load_prompt("published-v1")
    key = build_request(prompt, "a", model="m").key
    assert build_request(prompt, "a", model="m").key == key
    assert build_request(prompt, "b", model="m").key != key
    assert build_request(prompt, "a", model="n").key != key
    warmer = prompt.model_copy(update={"temperature": 0.5})
    assert build_request(warmer, "a", model="m").key != key


def test_an_unknown_prompt_names_the_nearest() -> None:
    with pytest.raises(CloverError, match="did you mean 'published-v1'"):
        load_prompt("publishd-v1")


@pytest.mark.parametrize(
    "line",
    [
        *("temperature: .nan", "temperature: .inf", "temperature: -1", "top_p: 0", "top_p: .nan"),
        *("max_tokens: -5", "max_tokens: 0", f"max_tokens: {10**30}", "pairs: [-4, 5]"),
    ],
)
def test_a_prompt_with_a_number_out_of_its_range_is_one_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "mine.yaml"
    fields = {"version: mine", "format: text", "pairs: [4, 5]", "max_tokens: 100"}
    name = line.partition(":")[0]
    kept = sorted(field for field in fields if not field.startswith(name))
    file.write_text("\n".join([*kept, line]))
    with pytest.raises(CloverError, match=rf"mine.yaml: {name}.*: input should be"):
        load_prompt(file)
    file.write_text("\n".join(fields))
    assert load_prompt(file).max_tokens == 100
