"""The prompt: one object, the same words in every stage."""

from __future__ import annotations

import pytest

from clover.core.config import PromptConfig
from clover.core.errors import CloverError
from clover.language.prompt import Prompt
from clover.language.protocol import GenerationSettings

CHAT = PromptConfig(
    template="<|im_start|>user\n{image}{question}<|im_end|>\n<|im_start|>assistant\n",
    answer_end="<|im_end|>",
    closed_suffix=" Answer yes or no.",
)


def test_a_chat_template_is_split_at_the_image() -> None:
    before, after = Prompt.from_config(CHAT).split("why {image}?")
    assert before == "<|im_start|>user\n"
    assert after == "why {image}?<|im_end|>\n<|im_start|>assistant\n"


def test_a_conversation_repeats_the_template_without_the_image() -> None:
    before, after = Prompt.from_config(CHAT).conversation([("q1", "a1"), ("q2", "a2")], "q3")
    assert before + after == (
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\na2<|im_end|>\n"
        "<|im_start|>user\nq3<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_conversation_without_history_is_the_training_prompt() -> None:
    prompt = Prompt.from_config(CHAT)
    assert prompt.conversation([], "q") == prompt.split("q")


def test_the_closed_suffix_is_added_once_and_to_closed_questions_only() -> None:
    prompt = Prompt.from_config(CHAT)
    closed = prompt.question("is it?", is_closed=True)
    assert closed == "is it? Answer yes or no."
    assert prompt.question(closed, is_closed=True) == closed
    assert prompt.question("what is it?") == "what is it?"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{question}", "holds {image} 0 times"),
        ("{image}{image}{question}", "holds {image} 2 times"),
        ("{image}", "holds {question} 0 times"),
        ("{question}{image}", "before {image}"),
    ],
)
def test_a_template_without_its_slots_is_refused(template: str, message: str) -> None:
    with pytest.raises(CloverError) as error:
        Prompt.from_config(PromptConfig(template=template))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [{"num_beams": 0}, {"max_tokens": 0}, {"min_tokens": 9, "max_tokens": 4}, {"top_p": 0.0}],
)
def test_impossible_generation_settings_name_the_limit(wrong: dict[str, int]) -> None:
    with pytest.raises(CloverError, match="it must be"):
        GenerationSettings(**wrong)  # type: ignore[arg-type]


def test_a_conversation_does_not_repeat_the_worked_examples() -> None:
    prompt = Prompt.from_config(
        PromptConfig(
            template="<u>yes Is it?<a>yes<e>\n<u>{image} {question}<a>",
            answer_end="<e>",
        )
    )
    before, after = prompt.conversation([("Which tissue?", "kidney")], "Which stain?")
    assert before == "<u>yes Is it?<a>yes<e>\n<u>"
    assert after == " Which tissue?<a>kidney<e>\n<u> Which stain?<a>"
