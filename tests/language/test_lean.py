"""Our own forward of Llama-shaped decoders against transformers', plain and packed."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from clover.core.config import LanguageConfig, PromptConfig
from clover.language import lean as module
from clover.language.decoder_only import DecoderOnly
from clover.language.lean import LeanDecoder, can_pack, is_llama_shaped
from clover.language.prompt import Prompt
from clover.language.protocol import GenerationSettings
from clover.language.quantise import quantise_int8
from clover.language.rows import RowBatch

from .tiny import ANSWERS, QUESTIONS, TEMPLATE, WORDS, tiny_llama, word_tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "sliding_window": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
BUILDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases, tied": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama of another head width": ("llama", {"head_dim": 16}),
    "llama 3's angles": ("llama", {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
}
needs_packing = pytest.mark.skipif(
    not can_pack(torch.float32), reason="this build of torch packs no weights"
)
GREEDY = GenerationSettings(max_tokens=12)


def raw(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SHAPE | more)))
    for name, weight in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):  # they begin as zeros and ones
            torch.nn.init.normal_(weight, mean=0.5, std=0.3)
    return model


def driven(kind: str, **more: Any) -> DecoderOnly:
    prompt = Prompt.from_config(PromptConfig(template=TEMPLATE, answer_end="<eos>"))
    config = LanguageConfig(weights=kind, licence="none")
    return DecoderOnly(raw(kind, **more), word_tokenizer(), prompt=prompt, config=config)


def lean_of(language: DecoderOnly) -> LeanDecoder:
    assert language._lean is not None
    return language._lean


def theirs(language: DecoderOnly) -> DecoderOnly:
    """The same weights, through transformers' own forward."""
    other = DecoderOnly(
        language.model, language.tokens.tokenizer, prompt=language.prompt, config=language.config
    )
    other._lean = None
    return other


def only(is_packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let weights stay plain, as where torch cannot pack them."""
    if not is_packed:
        monkeypatch.setattr(module, "can_pack", lambda dtype: False)


@pytest.fixture(params=sorted(BUILDS))
def built(request: pytest.FixtureRequest) -> DecoderOnly:
    kind, more = BUILDS[request.param]
    return driven(kind, **more)


@pytest.fixture(params=["plain", pytest.param("packed", marks=needs_packing)])
def is_packed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "packed")


@torch.no_grad()
def test_logits_equal_those_of_transformers(
    built: DecoderOnly, is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    visual = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(1))
    rows = [built.instruction_ids(question) for question in QUESTIONS]
    ids, mask = built._padded(rows)
    expected = theirs(built).logits_from_ids(visual, ids, mask)
    only(is_packed, monkeypatch)
    found = built.logits_from_ids(visual, ids, mask)
    assert lean_of(built).is_packed == is_packed
    seen = torch.cat([mask.new_ones(3, 4), mask], dim=1).bool()
    torch.testing.assert_close(found[seen], expected[seen], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_what_is_written_equals_what_transformers_writes(
    built: DecoderOnly, is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of unlike lengths, padded on the left, behind a shared beginning, step by step."""
    visual = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(1))
    expected = theirs(built).generate(visual, QUESTIONS, GREEDY)
    ranks = theirs(built).rank(visual[:1], QUESTIONS[0], ANSWERS)
    only(is_packed, monkeypatch)
    assert built.generate(visual, QUESTIONS, GREEDY) == expected
    assert lean_of(built).is_packed == is_packed
    assert built.rank(visual[:1], QUESTIONS[0], ANSWERS) == pytest.approx(ranks, abs=1e-3)


@torch.no_grad()
def test_rows_in_one_batch_read_as_through_transformers(
    built: DecoderOnly, is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = theirs(built)
    only(is_packed, monkeypatch)
    rows = [built.instruction_ids(question) for question in QUESTIONS]

    def run(language: DecoderOnly) -> Iterator[Tensor]:
        batch = RowBatch(language, 4)
        words = [language.word_embeddings(torch.tensor(row)) for row in rows]
        batch.admit([[]], [words[0][:2]])
        number = batch.hold(batch.copy_out(0, 0, 2))
        batch.remove(0)
        yield batch.admit([[], []], [words[0][2:], words[1]], [number, None])
        yield batch.step([5, 6])
        yield batch.admit([[]], [words[2]])
        yield batch.step([7, 5, 6])
        batch.remove(0)
        yield batch.step([5, 6])

    found = list(run(built))
    for mine, their in zip(found, run(other), strict=True):
        torch.testing.assert_close(mine, their, atol=1e-4, rtol=1e-4)


@needs_packing
def test_packed_weights_are_held_once_and_come_back_bit_for_bit(built: DecoderOnly) -> None:
    before = {name: item.clone() for name, item in built.model.state_dict().items()}
    lean = lean_of(built)
    assert lean.pack() and lean.pack()
    layer = built.model.base_model.layers[0]
    for weight in (layer.self_attn.k_proj.weight, layer.mlp.up_proj.weight):
        assert weight.untyped_storage().nbytes() == weight.element_size()
        assert weight.isnan().all()  # who reads it past us does not take it for weights
    assert not built.model.get_input_embeddings().weight.isnan().any()
    shapes = {name: item.shape for name, item in built.model.named_parameters()}
    after = built.model.state_dict()
    assert not lean.is_packed
    assert shapes == {name: item.shape for name, item in built.model.named_parameters()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@needs_packing
def test_learning_and_beam_search_find_plain_weights(visual: Tensor) -> None:
    language = tiny_llama()
    beams = GenerationSettings(num_beams=2, max_tokens=6)
    expected = language.generate(visual, QUESTIONS, beams)
    through = visual.clone().requires_grad_()
    language.loss(through, QUESTIONS, ANSWERS)[0].backward()
    lean_of(language).pack()
    again = visual.clone().requires_grad_()
    language.loss(again, QUESTIONS, ANSWERS)[0].backward()
    assert through.grad is not None and again.grad is not None
    assert torch.equal(through.grad, again.grad)
    assert not lean_of(language).is_packed
    lean_of(language).pack()
    assert language.generate(visual, QUESTIONS, beams) == expected


@needs_packing
def test_reading_the_beginning_of_what_is_learnt_packs_nothing(
    visual: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    language = tiny_llama()
    packings: list[bool] = []
    monkeypatch.setattr(LeanDecoder, "pack", lambda *_: bool(packings.append(True)))
    language.loss(visual.requires_grad_(), QUESTIONS, ANSWERS)
    assert len(language._prefixes) == 1 and not packings
    with torch.no_grad():
        language.loss(visual, QUESTIONS, ANSWERS)
    assert packings


@needs_packing
@torch.no_grad()
def test_weights_that_change_while_packed_are_those_that_are_used() -> None:
    language = driven("llama", tie_word_embeddings=True)
    hidden = torch.randn(2, 32)
    lean_of(language).pack()
    language.logits(hidden)
    language.model.get_input_embeddings().weight.add_(1.0)
    expected = hidden @ language.model.lm_head.weight.t()
    torch.testing.assert_close(language.logits(hidden), expected, atol=1e-4, rtol=1e-4)
    language.model.to(torch.bfloat16)
    answer = language.generate(None, QUESTIONS, GREEDY)
    assert answer == language.generate(None, QUESTIONS, GREEDY)
    assert language.model.base_model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_transformers_is(
    is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(is_packed, monkeypatch)
    ids, mask = tiny_llama()._padded([tiny_llama().instruction_ids(QUESTIONS[2])])
    exact = tiny_llama().logits_from_ids(None, ids, mask)
    language = tiny_llama()
    language.model.to(torch.bfloat16)
    error = (theirs(language).logits_from_ids(None, ids, mask) - exact).norm()
    if is_packed and not lean_of(language).pack():
        pytest.skip("oneDNN multiplies no bfloat16 here")
    assert (language.logits_from_ids(None, ids, mask) - exact).norm() < 1.5 * error


@torch.no_grad()
def test_a_padding_token_that_sees_nothing_harms_nobody() -> None:
    language = tiny_llama("{image}{question}")  # no beginning that every token sees
    rows = [language.instruction_ids(question) for question in QUESTIONS]
    ids, mask = language._padded(rows, is_left=True)
    embeds = language.word_embeddings(ids)
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    found = lean_of(language).hidden(embeds, mask=mask, positions=positions)
    for row, own in enumerate(rows):
        alone = lean_of(language).hidden(language.word_embeddings(torch.tensor([own])))
        torch.testing.assert_close(found[row, -len(own) :], alone[0], atol=1e-5, rtol=1e-5)


def test_other_builds_are_left_to_transformers() -> None:
    assert is_llama_shaped(raw("llama"))
    assert not is_llama_shaped(raw("gemma"))
    assert not is_llama_shaped(raw("gpt_neox"))
    assert not is_llama_shaped(raw("qwen3"))
    assert not is_llama_shaped(raw("llama", hidden_act="gelu"))
    assert not is_llama_shaped(raw("mistral", sliding_window=16))
    bent = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert not is_llama_shaped(raw("llama", rope_parameters=bent))
    small = raw("llama")
    quantise_int8(small)
    assert not is_llama_shaped(small)


def test_gradients_and_training_mode_are_left_to_transformers() -> None:
    language = tiny_llama()
    lean = lean_of(language)
    assert not lean.is_usable
    with torch.no_grad():
        assert lean.is_usable
        language.model.train()
        assert not lean.is_usable
    language.model.eval()


def test_prompts_of_the_same_model_share_its_weights_state() -> None:
    language = tiny_llama()
    assert theirs(language).model is language.model
    assert LeanDecoder.of(language.model) is lean_of(language)


def test_a_long_text_is_read_in_pieces_and_alike(
    built: DecoderOnly, is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(is_packed, monkeypatch)
    embeds = torch.randn(2, 19, built.hidden_size, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[1, :6] = 0
    lean = lean_of(built)
    with torch.no_grad():
        whole = lean.hidden(embeds, mask=mask)
        monkeypatch.setattr(module, "_SCORES", 2 * lean._heads * 19 * 4)  # four tokens at a time
        pieces = lean.hidden(embeds, mask=mask)
        monkeypatch.setattr(module, "_SCORES", 1)
        singly = lean.hidden(embeds, mask=mask)
    for found in (pieces, singly):
        torch.testing.assert_close(found[0], whole[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found[1, 6:], whole[1, 6:], atol=1e-5, rtol=1e-4)


@needs_packing
def test_a_pack_that_fails_half_way_gives_back_what_it_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    language = tiny_llama()
    before = {name: item.clone() for name, item in language.model.state_dict().items()}
    pack, made = module._pack, []

    def tight(weight: Tensor) -> Tensor:
        made.append(0)
        if len(made) == 8:  # in the second layer
            raise MemoryError
        return pack(weight)

    monkeypatch.setattr(module, "_pack", tight)
    lean = lean_of(language)
    with pytest.raises(MemoryError):
        lean.pack()
    assert not lean.is_packed and not lean.pack(), "it is not tried again"
    after = language.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@needs_packing
def test_nothing_is_packed_under_a_pass_of_transformers_in_another_thread() -> None:
    language = tiny_llama()
    lean, layer = lean_of(language), language.model.base_model.layers[0]
    seen: list[bool] = []

    def meanwhile(*_: Any) -> None:
        with torch.no_grad():
            lean.hidden(torch.zeros(1, 2, language.hidden_size))
        seen.append(lean.is_packed)

    def run_aside(*_: Any) -> None:
        thread = threading.Thread(target=meanwhile)
        thread.start()
        thread.join()

    handle = layer.register_forward_pre_hook(run_aside)
    with torch.no_grad():
        found = language.model(torch.tensor([[1, 2, 3]])).logits
    handle.remove()
    assert seen == [False]
    assert not found.isnan().any()
    with torch.no_grad():
        lean.hidden(torch.zeros(1, 2, language.hidden_size))
    assert lean.is_packed, "afterwards it is"


@needs_packing
def test_a_copy_of_a_packed_model_stands_by_itself() -> None:
    language = tiny_llama()
    before = {name: item.clone() for name, item in language.model.state_dict().items()}
    lean_of(language).pack()
    copied = copy.deepcopy(language.model)
    other = LeanDecoder.of(copied)
    assert other is not None and other is not lean_of(language)
    assert other._model is copied
    other.pack()
    assert not lean_of(language).is_packed
    found = copied.state_dict()
    assert all(torch.equal(before[name], found[name]) for name in before)
    body = language.model.base_model
    lean_of(language).pack()
    assert not any(item.isnan().any() for item in body.state_dict().values())
