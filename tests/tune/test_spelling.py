"""Spelling: whole, or as far as an answer differs from every other."""

from __future__ import annotations

import pytest

from clover.core.errors import CloverError
from clover.tune.spelling import Spelling, SpellingKind

WORDS: dict[str, int] = {}


def encode(text: str) -> list[int]:
    """One token a word, and " -" is one."""
    return [WORDS.setdefault(word, len(WORDS)) for word in text.split()]


def spelling(*answers: str, kind: SpellingKind = "whole", places: int = 4) -> Spelling:
    return Spelling.of(answers, encode=encode, num_places=places, filler=" -", kind=kind)


def test_an_answer_is_filled_up_to_the_number_of_visual_tokens() -> None:
    found = spelling("lung", "a b c d", "a b c d e", "")
    assert found.text("lung") == " lung - - -"
    assert found.text("a b c d") == " a b c d"
    assert found.text("a b c d e") is None
    assert set(found.ids) == {"lung", "a b c d"}


def test_the_shortest_spelling_ends_where_no_other_answer_goes_on() -> None:
    found = spelling(
        "lung",
        "lung adenocarcinoma",
        "lung squamous cell carcinoma",
        "colon adenocarcinoma",
        "benign lung tissue",
        "benign colon tissue",
        kind="shortest",
    )
    assert {answer: found.text(answer) for answer in found.ids} == {
        "lung": " lung - - -",
        "lung adenocarcinoma": " lung adenocarcinoma - -",
        "lung squamous cell carcinoma": " lung squamous - -",
        "colon adenocarcinoma": " colon - - -",
        "benign lung tissue": " benign lung - -",
        "benign colon tissue": " benign colon - -",
    }
    assert all(
        tokens == encode(found.text(text) or "")[: len(tokens)]
        for text, tokens in found.ids.items()
    )


def test_an_answer_too_long_to_be_spelt_does_not_lengthen_the_others() -> None:
    found = spelling("lung", "lung a b c d", kind="shortest")
    assert found.text("lung") == " lung - - -" and "lung a b c d" not in found.ids


def test_two_writings_of_the_same_tokens_are_one_answer() -> None:
    found = spelling("no tumour", "no  tumour", kind="shortest")
    assert found.ids["no tumour"] == found.ids["no  tumour"] == encode("no")


def test_a_filler_of_two_tokens_is_refused() -> None:
    with pytest.raises(CloverError, match="is 2 tokens of the language model"):
        Spelling.of(["lung"], encode=encode, num_places=4, filler=" - -")
