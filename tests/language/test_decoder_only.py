"""Decoder-only models: the quick path equals the plain one, generation equals transformers'."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clover.core.errors import CloverError
from clover.language import GenerationSettings
from clover.language import decoder_only as module
from clover.language.decoder_only import DecoderOnly
from clover.language.protocol import LanguageModel
from clover.language.shared_prefix import SharedPrefix, attend, behind, share_prefix

from .tiny import ANSWERS, QUESTIONS, tiny_llama

GREEDY = GenerationSettings(max_tokens=12)


def plain_loss(language: DecoderOnly, visual: Tensor | None) -> tuple[Tensor, int]:
    """Return the loss of one full forward pass a row, written from SPEC 4.2."""
    total, count = torch.zeros(()), 0
    embed = language.model.get_input_embeddings()
    for row, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
        before, after = language.prompt.split(question)
        instruction = language.tokens.encode(after)
        wanted = [*language.tokens.encode(answer), language.tokens.end_id]
        parts = [embed(torch.tensor(language.tokens.encode(before), dtype=torch.long))]
        if visual is not None:
            parts.append(visual[row])
        parts.append(embed(torch.tensor(instruction + wanted)))
        logits = language.model(inputs_embeds=torch.cat(parts)[None]).logits[0]
        predicted = logits[-len(wanted) - 1 : -1]
        total = total + F.cross_entropy(predicted, torch.tensor(wanted), reduction="sum")
        count += len(wanted)
    return total, count


@pytest.mark.parametrize("template", ["<user> {image}{question} <assistant>", "{image}{question}"])
def test_cached_prefix_and_gathered_logits_equal_the_plain_forward(
    template: str, visual: Tensor
) -> None:
    language = tiny_llama(template)
    quick, plain = visual.clone().requires_grad_(), visual.clone().requires_grad_()
    total, count = language.loss(quick, QUESTIONS, ANSWERS)
    expected, expected_count = plain_loss(language, plain)
    (total / count).backward()
    (expected / expected_count).backward()
    assert int(count) == expected_count
    assert total.dtype == torch.float32
    assert abs(total - expected).item() <= 1e-5 * expected_count
    assert quick.grad is not None and plain.grad is not None
    assert (quick.grad - plain.grad).abs().max() <= 1e-5
    assert quick.grad.abs().min(dim=2).values.max() > 0


def test_the_prefix_is_computed_once_and_stays_right(visual: Tensor) -> None:
    llama = tiny_llama()
    first, _ = llama.loss(visual, QUESTIONS, ANSWERS)
    llama.generate(visual, QUESTIONS, GREEDY)
    second, _ = llama.loss(visual, QUESTIONS, ANSWERS)
    assert torch.equal(first, second)
    assert len(llama._prefixes) == 1


def test_loss_without_an_image_equals_the_plain_forward(llama: DecoderOnly) -> None:
    total, count = llama.loss(None, QUESTIONS, ANSWERS)
    expected, expected_count = plain_loss(llama, None)
    assert int(count) == expected_count
    assert abs(total - expected).item() <= 1e-5 * expected_count


def test_scoring_the_vocabulary_in_chunks_changes_nothing(
    llama: DecoderOnly, visual: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_visual, chunked_visual = visual.clone().requires_grad_(), visual.clone().requires_grad_()
    whole, _ = llama.loss(whole_visual, QUESTIONS, ANSWERS)
    monkeypatch.setattr(module, "_LOGIT_ROWS", 2)
    chunked, _ = llama.loss(chunked_visual, QUESTIONS, ANSWERS)
    whole.backward()
    chunked.backward()
    assert torch.allclose(whole, chunked, atol=1e-5)
    assert whole_visual.grad is not None and chunked_visual.grad is not None
    assert torch.allclose(whole_visual.grad, chunked_visual.grad, atol=1e-5)


def test_nothing_of_the_language_model_learns(llama: DecoderOnly, visual: Tensor) -> None:
    total, _ = llama.loss(visual.clone().requires_grad_(), QUESTIONS, ANSWERS)
    total.backward()
    assert all(not p.requires_grad and p.grad is None for p in llama.model.parameters())
    assert not llama.model.training


def test_a_long_instruction_loses_its_beginning_and_a_long_answer_its_end() -> None:
    language = tiny_llama(max_instruction_tokens=4, max_answer_tokens=3)
    words = language.tokens.tokenizer.convert_ids_to_tokens
    assert words(language.instruction_ids("what tissue is shown ?")) == [
        "is",
        "shown",
        "?",
        "<assistant>",
    ]
    assert words(language.answer_ids("colon with many cells")) == ["colon", "with", "many"]
    assert words(language.answer_ids("no")) == ["no", "<eos>"]


@pytest.mark.parametrize("min_tokens", [1, 6])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_ids_equal_those_of_transformers(
    llama: DecoderOnly, visual: Tensor, min_tokens: int, penalty: float
) -> None:
    settings = GenerationSettings(max_tokens=12, min_tokens=min_tokens, repetition_penalty=penalty)
    prompts = [llama.instruction_ids(question) for question in QUESTIONS]
    ours = llama.generate_from_ids(visual, prompts, settings, prefix=llama.prefix_ids)
    for row, prompt in enumerate(prompts):
        embed = llama.model.get_input_embeddings()
        start, rest = embed(torch.tensor(llama.prefix_ids)), embed(torch.tensor(prompt))
        embeds = torch.cat([start, visual[row], rest])[None]
        theirs = llama.model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            max_new_tokens=12,
            min_new_tokens=min_tokens,
            repetition_penalty=penalty,
            do_sample=False,
            eos_token_id=1,
            pad_token_id=1,
        )[0].tolist()
        assert ours[row] == theirs


def test_generation_does_not_depend_on_the_batch(llama: DecoderOnly, visual: Tensor) -> None:
    for settings in (GREEDY, GenerationSettings(max_tokens=12, temperature=1.0, top_p=0.9, seed=3)):
        together = llama.generate(visual, QUESTIONS, settings)
        alone = [
            llama.generate(visual[row : row + 1], [question], settings)[0]
            for row, question in enumerate(QUESTIONS)
        ]
        assert together == alone


def test_beam_search_with_a_padded_batch_equals_one_row_at_a_time(
    llama: DecoderOnly, visual: Tensor
) -> None:
    settings = GenerationSettings(num_beams=3, max_tokens=8)
    together = llama.generate(visual, QUESTIONS, settings)
    alone = [llama.generate(visual[r : r + 1], [q], settings)[0] for r, q in enumerate(QUESTIONS)]
    assert together == alone


def test_different_seeds_sample_different_answers(llama: DecoderOnly, visual: Tensor) -> None:
    answers = {
        llama.generate(visual[:1], QUESTIONS[:1], GenerationSettings(temperature=2.0, seed=seed))[0]
        for seed in range(4)
    }
    assert len(answers) > 1


def test_streamed_pieces_join_to_the_generated_answer(llama: DecoderOnly, visual: Tensor) -> None:
    for row, question in enumerate(QUESTIONS):
        pieces = list(llama.stream(visual[row : row + 1], question, GREEDY))
        assert "".join(pieces) == llama.generate(visual[row : row + 1], [question], GREEDY)[0]


def test_a_conversation_is_answered_from_its_whole_text(llama: DecoderOnly, visual: Tensor) -> None:
    _, after = llama.prompt.conversation([("is there necrosis ?", "no")], "what stain")
    answer = llama.generate_text(visual[:1], [after], GREEDY)[0]
    assert "".join(llama.stream_text(visual[:1], after, GREEDY)) == answer
    assert answer != llama.generate(visual[:1], ["what stain"], GREEDY)[0]


def test_visual_tokens_of_another_width_are_named(llama: DecoderOnly) -> None:
    with pytest.raises(CloverError, match="visual tokens are 16 wide, tiny-llama reads 32"):
        llama.generate(torch.zeros(1, 4, 16), ["liver"], GREEDY)


def test_rank_is_minus_the_loss_of_each_candidate(llama: DecoderOnly, visual: Tensor) -> None:
    candidates = ["yes", "no", "colon with keratin"]
    scores = llama.rank(visual[:1], QUESTIONS[0], candidates)
    for score, candidate in zip(scores, candidates, strict=True):
        total, _ = llama.loss(visual[:1], QUESTIONS[:1], [candidate])
        assert score == pytest.approx(-float(total), abs=1e-4)
    assert llama.choose(visual[:1], QUESTIONS[:1], candidates) == [
        max(range(3), key=scores.__getitem__)
    ]


def test_the_image_changes_the_answer_scores(llama: DecoderOnly, visual: Tensor) -> None:
    one, _ = llama.loss(visual[:1], QUESTIONS[:1], ANSWERS[:1])
    other, _ = llama.loss(visual[1:2], QUESTIONS[:1], ANSWERS[:1])
    assert abs(one - other) > 1e-3


def test_a_prompt_beyond_the_model_is_named_with_the_limit(llama: DecoderOnly) -> None:
    with pytest.raises(CloverError, match="more than the model's 128"):
        llama.generate(None, ["is"], GenerationSettings(max_tokens=200))


def test_bfloat16_weights_still_give_a_float32_loss(visual: Tensor) -> None:
    language = tiny_llama()
    exact, _ = language.loss(visual, QUESTIONS, ANSWERS)
    language.model.to(torch.bfloat16)
    rough, _ = language.loss(visual, QUESTIONS, ANSWERS)
    assert rough.dtype == torch.float32
    assert abs(rough - exact) / exact < 0.05


def test_both_classes_satisfy_the_protocol(llama: DecoderOnly, t5: LanguageModel) -> None:
    assert isinstance(llama, LanguageModel)
    assert isinstance(t5, LanguageModel)


@pytest.mark.parametrize("template", ["<user> {image}{question} <assistant>", "{image}{question}"])
def test_a_shared_beginning_answers_as_a_copied_one(template: str, visual: Tensor) -> None:
    shared, copied = tiny_llama(template), tiny_llama(template)
    assert shared._is_shared
    copied._is_shared = False
    settings = GenerationSettings(max_tokens=6, min_tokens=6)
    found, expected = [], []
    for language, kept in ((shared, found), (copied, expected)):
        wanted = visual.clone().requires_grad_()
        total, _ = language.loss(wanted, QUESTIONS, ANSWERS)
        total.backward()
        assert wanted.grad is not None
        kept += [total.detach(), wanted.grad]
        kept.append(torch.tensor(language.rank(visual[:1], QUESTIONS[0], ANSWERS)))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4
    texts = shared.generate(visual, QUESTIONS, settings)
    assert texts == copied.generate(visual, QUESTIONS, settings)
    alone = [
        shared.generate(visual[row : row + 1], [question], settings)[0]
        for row, question in enumerate(QUESTIONS)
    ]
    assert texts == alone


def test_the_shared_beginning_is_seen_whole_and_own_tokens_causally() -> None:
    """The attention function against a loop over rows, heads and places."""
    random = torch.Generator().manual_seed(5)
    batch, heads, groups, length, past, before, width = 2, 4, 2, 3, 2, 5, 8
    size = past + length

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    query, key = draw(batch, heads, length, width), draw(batch, groups, size, width)
    value = draw(batch, groups, size, width)
    prefix = SharedPrefix((draw(groups, before, width),), (draw(groups, before, width),))
    with behind(prefix):
        output, _ = attend(SimpleNamespace(layer_idx=0), query, key, value, None)
        seen = torch.ones(batch, 1, length, size, dtype=torch.bool).tril(past)
        masked, _ = attend(SimpleNamespace(layer_idx=0), query, key, value, seen)
    for row in range(batch):
        for head in range(heads):
            group = head // (heads // groups)
            for place in range(length):
                keys = torch.cat([prefix.keys[0][group], key[row, group, : past + place + 1]])
                values = torch.cat([prefix.values[0][group], value[row, group, : past + place + 1]])
                weights = (keys @ query[row, head, place] / width**0.5).softmax(dim=0)
                assert (output[row, place, head] - weights @ values).abs().max() <= 1e-5
    assert torch.equal(output, masked)


def test_a_model_with_a_sliding_window_keeps_its_own_attention() -> None:
    model = tiny_llama().model
    model.config.sliding_window = 16
    assert not share_prefix(model)
