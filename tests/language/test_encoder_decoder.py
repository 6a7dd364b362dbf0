"""Encoder-decoder models, on a tiny random T5."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clover.language import GenerationSettings
from clover.language.encoder_decoder import EncoderDecoder

from .tiny import ANSWERS, QUESTIONS

GREEDY = GenerationSettings(max_tokens=10)


def test_loss_of_a_padded_batch_equals_one_row_at_a_time(
    t5: EncoderDecoder, visual: Tensor
) -> None:
    total, count = t5.loss(visual, QUESTIONS, ANSWERS)
    expected, expected_count = 0.0, 0
    for row, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
        labels = torch.tensor([[*t5.tokens.encode(answer), 1]])
        words = t5.model.get_input_embeddings()(torch.tensor([*t5.tokens.encode(question), 1]))
        out = t5.model(
            inputs_embeds=torch.cat([visual[row], words])[None],
            decoder_input_ids=torch.cat([torch.tensor([[0]]), labels[:, :-1]], dim=1),
        )
        expected += float(F.cross_entropy(out.logits[0], labels[0], reduction="sum"))
        expected_count += labels.numel()
    assert int(count) == expected_count
    assert float(total) == pytest.approx(expected, abs=1e-4)


def test_gradients_reach_the_visual_tokens_and_nothing_else(
    t5: EncoderDecoder, visual: Tensor
) -> None:
    visual = visual.requires_grad_()
    total, _ = t5.loss(visual, QUESTIONS, ANSWERS)
    total.backward()
    assert visual.grad is not None and visual.grad.abs().sum() > 0
    assert all(p.grad is None for p in t5.model.parameters())


def test_the_frozen_model_has_no_dropout(t5: EncoderDecoder, visual: Tensor) -> None:
    first, _ = t5.loss(visual, QUESTIONS, ANSWERS)
    second, _ = t5.loss(visual, QUESTIONS, ANSWERS)
    assert torch.equal(first, second)


def test_greedy_ids_equal_those_of_transformers(t5: EncoderDecoder, visual: Tensor) -> None:
    prompts = [t5.instruction_ids(question) for question in QUESTIONS]
    ours = t5.generate_from_ids(visual, prompts, GREEDY)
    embeds, mask = t5._embedded(visual, prompts, ())
    theirs = t5.model.generate(
        inputs_embeds=embeds, attention_mask=mask, max_new_tokens=10, min_new_tokens=1,
        do_sample=False,
    )[:, 1:].tolist()  # fmt: skip
    for own, other in zip(ours, theirs, strict=True):
        assert own == other[: len(own)]
        assert not any(other[len(own) :])


def test_streamed_pieces_join_to_the_generated_answer(t5: EncoderDecoder, visual: Tensor) -> None:
    pieces = list(t5.stream(visual[:1], QUESTIONS[0], GREEDY))
    assert "".join(pieces) == t5.generate(visual[:1], QUESTIONS[:1], GREEDY)[0]


def test_rank_is_minus_the_loss_of_each_candidate(t5: EncoderDecoder, visual: Tensor) -> None:
    candidates = ["yes", "colon with keratin"]
    for score, candidate in zip(
        t5.rank(visual[:1], QUESTIONS[0], candidates), candidates, strict=True
    ):
        total, _ = t5.loss(visual[:1], QUESTIONS[:1], [candidate])
        assert score == pytest.approx(-float(total), abs=1e-4)


def test_beam_search_answers_every_row(t5: EncoderDecoder, visual: Tensor) -> None:
    settings = GenerationSettings(num_beams=3, max_tokens=6)
    assert len(t5.generate(visual, QUESTIONS, settings)) == 3
