"""Rows that may give one of a few answers; beam search beside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clover.language.choice import ChoiceConstraint
from clover.language.decoder_only import DecoderOnly
from clover.language.encoder_decoder import EncoderDecoder
from clover.language.protocol import GenerationSettings

GREEDY = GenerationSettings(max_tokens=8)
QUESTIONS = ["is there necrosis ?", "what tissue", "describe the image of liver"]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_yes_or_no_is_chosen_by_probability(
    kind: str, request: pytest.FixtureRequest, visual: Tensor
) -> None:
    language: DecoderOnly | EncoderDecoder = request.getfixturevalue(kind)
    both = [("yes", "no"), None, ("yes", "no")]
    answers = language.generate(visual, QUESTIONS, GREEDY, choices=both)
    free = language.generate(visual, QUESTIONS, GREEDY)
    assert answers[1] == free[1]
    for row in (0, 2):
        # One token each: the likelier first token decides, whatever ends the answer.
        image, prompt = visual[row : row + 1], [language.text_ids(split(language, row))]
        with torch.no_grad():
            logits, _ = language._begin(image, prompt, language.prefix_ids, 4)
        yes, no = (logits[0, language.tokens.encode(word)[0]] for word in ("yes", "no"))
        assert answers[row] == ("yes" if yes > no else "no")


def split(language: DecoderOnly | EncoderDecoder, row: int) -> str:
    return language.prompt.split(QUESTIONS[row])[1]


def test_a_choice_is_followed_to_its_end_and_no_further() -> None:
    constraint = ChoiceConstraint([[5, 6], [5], [7]], stop_ids=frozenset({1}), num_tokens=9)
    assert constraint.allowed().nonzero().flatten().tolist() == [5, 7]
    constraint.accept(5)
    assert constraint.allowed().nonzero().flatten().tolist() == [1, 6]
    constraint.accept(6)
    assert constraint.allowed().nonzero().flatten().tolist() == [1]


def test_beam_search_is_that_of_transformers_and_no_worse_than_greedy(
    llama: DecoderOnly, visual: Tensor
) -> None:
    """Both against transformers' own, fed with word embeddings and no cache of ours."""
    for question, row in zip(QUESTIONS, range(3), strict=True):
        ids = [*llama.prefix_ids, *llama.text_ids(llama.prompt.split(question)[1])]
        before, after = ids[: len(llama.prefix_ids)], ids[len(llama.prefix_ids) :]
        embed = llama.model.get_input_embeddings()
        rows = torch.cat(
            [
                embed(torch.tensor([before])),
                visual[row : row + 1],
                embed(torch.tensor([after])),
            ],
            dim=1,
        )
        for beams in (1, 5):
            settings = GenerationSettings(num_beams=beams, min_tokens=5, max_tokens=12)
            theirs = llama.model.generate(
                inputs_embeds=rows,
                attention_mask=torch.ones(rows.shape[:2], dtype=torch.long),
                num_beams=beams,
                do_sample=False,
                min_new_tokens=5,
                max_new_tokens=12,
                eos_token_id=sorted(llama.tokens.stop_ids),
                pad_token_id=llama.tokens.end_id,
            )[0].tolist()
            ours = llama.generate(visual[row : row + 1], [question], settings)[0]
            assert ours == llama.tokens.decode(theirs)
            assert len(theirs) >= 5


def test_beam_search_of_an_encoder_decoder_is_that_of_transformers(
    t5: EncoderDecoder, visual: Tensor
) -> None:
    settings = GenerationSettings(num_beams=5, min_tokens=5, max_tokens=12)
    for row, question in enumerate(QUESTIONS):
        text = [*t5.prefix_ids], t5.text_ids(t5.prompt.split(question)[1])
        embed = t5.model.get_input_embeddings()
        rows = torch.cat(
            [
                embed(torch.tensor([text[0]], dtype=torch.long)),
                visual[row : row + 1],
                embed(torch.tensor([text[1]])),
            ],
            dim=1,
        )
        theirs = t5.model.generate(
            inputs_embeds=rows,
            attention_mask=torch.ones(rows.shape[:2], dtype=torch.long),
            num_beams=5,
            do_sample=False,
            min_new_tokens=5,
            max_new_tokens=12,
            eos_token_id=sorted(t5.tokens.stop_ids),
            pad_token_id=t5.tokens.end_id,
        )[0].tolist()
        assert t5.generate(visual[row : row + 1], [question], settings)[0] == t5.tokens.decode(
            theirs
        )
