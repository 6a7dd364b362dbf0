"""Phrases that a small model may copy: words of the caption, whole, and never without their no."""

from __future__ import annotations

from pathlib import Path

import pytest

from clover.core.record import read_records
from clover.instruct.description import describe
from clover.instruct.parse import parse_pairs
from clover.instruct.phrase import MAX_PHRASES, MAX_WORDS, phrases
from clover.instruct.prompt import build_request, load_prompt

TEXT = Path(__file__).parents[3] / "shared" / "data" / "text"


def test_a_phrase_begins_and_ends_where_one_may() -> None:
    found = phrases("Large atypical cells which form irregular ducts in the stroma, H&E.")
    assert found == [
        "Large atypical cells",
        "Large atypical cells which form irregular ducts",
        "Large atypical cells which form irregular ducts in the stroma",
        "irregular ducts",
        "irregular ducts in the stroma",
        "stroma",
    ]


def test_what_is_denied_is_copied_with_its_denial_or_not_at_all() -> None:
    assert phrases("Liver with no fibrosis.") == ["Liver", "Liver with no fibrosis", "no fibrosis"]
    assert "necrosis" not in phrases("Liver without necrosis.")
    assert "Necrosis" not in phrases("Necrosis is absent. Fat.")


def test_dates_magnifications_and_figures_are_no_answers() -> None:
    assert phrases("Liver, x400, May 2012 (Fig. 3)") == ["Liver"]


def test_a_long_caption_keeps_the_short_phrases() -> None:
    found = phrases(" with ".join(f"pale cell{number}" for number in range(400)))
    assert len(found) == MAX_PHRASES
    assert max(len(phrase.split()) for phrase in found) <= 3


@pytest.mark.parametrize("name", ["captions_peir_histology.csv", "patchgastricadc22_captions.csv"])
def test_of_real_captions_every_phrase_is_a_piece(name: str) -> None:
    if not (TEXT / name).exists():
        pytest.skip(f"no shared file {name}")
    for record in read_records(TEXT / name, needs="caption").records:
        caption = record.caption or ""
        for phrase in phrases(caption):
            assert phrase in describe(caption)
            assert len(phrase.split()) <= MAX_WORDS


def test_the_copying_prompt_asks_for_phrases_of_its_own_caption() -> None:
    prompt = load_prompt("copied-v1")
    body = build_request(prompt, "Liver with fat.", model="m").body
    schema = body["response_format"]["json_schema"]["schema"]
    pair = schema["properties"]["pairs"]["items"]["properties"]
    assert pair["answer"]["enum"] == ["Liver", "Liver with fat", "fat"]
    # Its own example obeys the rule, or the model would be shown what it may not do.
    assert prompt.example is not None
    allowed = phrases(prompt.example.caption)
    assert {pair.answer for pair in parse_pairs(prompt.example.answer)} <= set(allowed)


def test_a_caption_without_a_phrase_may_still_be_copied_whole() -> None:
    body = build_request(load_prompt("copied-v1"), "It is as it was", model="m").body
    pairs = body["response_format"]["json_schema"]["schema"]["properties"]["pairs"]
    assert pairs["items"]["properties"]["answer"]["enum"] == ["It is as it was"]
