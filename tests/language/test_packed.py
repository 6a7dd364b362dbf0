"""Rows read one after another in one sequence beside rows read alone, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from clover.core.config import LanguageConfig, PromptConfig
from clover.language.decoder_only import DecoderOnly
from clover.language.packed import FAMILIES as PACKED
from clover.language.packed import PackedRows, attend_packed
from clover.language.prompt import Prompt

from .tiny import TEMPLATE, WORDS, tiny_llama, word_tokenizer

LENGTHS = [[3, 7, 1, 5], [6], [4, 4, 4]]
COMMON: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "gemma": {"num_key_value_heads": 1, "head_dim": 8},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gpt_neox": {},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
}
# An image, a question and an answer of different lengths; one row without a question.
QUESTIONS = [[5, 9, 4], [], [7], [6, 8, 10, 11, 12, 13, 4], [9, 9]]
ANSWERS = [[20, 1], [21, 22, 23, 24, 1], [1], [25, 1], [26, 27, 1]]
PREFIX = [2, 14, 15, 16]


def family(name: str, **more: Any) -> DecoderOnly:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(COMMON | FAMILIES.get(name, {}) | more))
    prompt = Prompt.from_config(PromptConfig(template=TEMPLATE, answer_end="<eos>"))
    return DecoderOnly(
        AutoModelForCausalLM.from_config(config),
        word_tokenizer(),
        prompt=prompt,
        config=LanguageConfig(weights=name, licence="none"),
    )


def images(rows: int = len(QUESTIONS)) -> Tensor:
    drawn = torch.randn(rows, 4, 32, generator=torch.Generator().manual_seed(1))
    return drawn.requires_grad_()


def alone(
    language: DecoderOnly, visual: Tensor | None, row: int, prefix: Sequence[int], **other: Any
) -> Tensor:
    """Return the loss of a row by transformers' own attention, every token scored."""
    model = language.model
    kept = model.config._attn_implementation
    model.set_attn_implementation("eager")
    words = model.get_input_embeddings()
    ids = torch.tensor([*QUESTIONS[row], *ANSWERS[row]], dtype=torch.long)
    parts = [words(torch.tensor(prefix, dtype=torch.long)), words(ids)]
    if visual is not None:
        parts.insert(1, visual[row].to(parts[0].dtype))
    logits = model(inputs_embeds=torch.cat(parts)[None], use_cache=False).logits[0]
    model.set_attn_implementation(kept)
    size = len(ANSWERS[row])
    said = torch.tensor(ANSWERS[row])
    return F.cross_entropy(logits[-size - 1 : -1].float(), said, reduction="sum")


def losses(
    language: DecoderOnly,
    visual: Tensor | None,
    questions: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    prefix: Sequence[int],
) -> Tensor:
    """Return the packed loss of each row."""
    assert language._packs
    found, rows = language._answer_losses(
        visual, questions, answers, past=language._past(prefix, len(questions), is_kept=False)
    )
    return torch.zeros(len(questions)).index_add(0, rows, found)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("num_before", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_attends_to_itself_and_to_what_is_before_it(
    lengths: list[int], num_before: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    heads, groups, width, scale = 6, 2, 8, 0.4
    size = sum(lengths)
    asked = [
        torch.randn(1, count, size, width).to(dtype).requires_grad_()
        for count in (heads, groups, groups)
    ]
    before = torch.randn(2, groups, num_before, width).to(dtype)
    found = attend_packed(
        *asked,
        rows=PackedRows(lengths),
        before=(before[0], before[1]) if num_before else None,
        scale=scale,
    )
    exact = [item.detach().float().requires_grad_() for item in asked]
    query, key, value = exact
    naive = torch.zeros(1, size, heads, width)
    start = 0
    for length in lengths:
        for head in range(heads):
            group = head // (heads // groups)
            for place in range(start, start + length):
                own = slice(start, place + 1)
                keys = torch.cat([before[0, group].float(), key[0, group, own]])
                values = torch.cat([before[1, group].float(), value[0, group, own]])
                weights = (keys @ query[0, head, place] * scale).softmax(dim=0)
                naive[0, place, head] = weights @ values
        start += length
    loose = {"rtol": 1e-5, "atol": 1e-6}
    if dtype == torch.bfloat16:
        loose = {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(found.float(), naive, **loose)
    slope = torch.randn_like(naive)
    pairs = zip(
        torch.autograd.grad(found, asked, slope.to(dtype)),
        torch.autograd.grad(naive, exact, slope),
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.float(), theirs, **loose)


def test_every_family_that_is_packed_is_tried_here() -> None:
    assert set(FAMILIES) == PACKED
    assert all(family(name)._packs for name in FAMILIES)


@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("prefix", [[], PREFIX])
def test_packed_rows_give_the_loss_and_gradient_of_rows_alone(name: str, prefix: list[int]) -> None:
    language = family(name)
    packed, plain = images(), images()
    assert language._packs
    total, count = language.loss_from_ids(packed, QUESTIONS, ANSWERS, prefix=prefix)
    expected = sum(alone(language, plain, row, prefix) for row in range(len(QUESTIONS)))
    assert int(count) == sum(map(len, ANSWERS))
    (total / count).backward()
    (expected / count).backward()
    assert abs(total - expected) / count <= 1e-5
    assert packed.grad is not None and plain.grad is not None
    assert (packed.grad - plain.grad).abs().max() <= 1e-5
    assert plain.grad.abs().amax(dim=2).min() > 0


@pytest.mark.parametrize("prefix", [[], PREFIX])
def test_one_row_is_a_sequence_too(prefix: list[int]) -> None:
    language, visual = tiny_llama(), images(1)
    total, _ = language.loss_from_ids(visual, QUESTIONS[:1], ANSWERS[:1], prefix=prefix)
    torch.testing.assert_close(total, alone(language, visual, 0, prefix), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", [[], PREFIX])
def test_rows_without_an_image_are_packed_too(prefix: list[int]) -> None:
    language = tiny_llama()
    rows = [0, 2, 3, 4]  # the second asks nothing: without an image there is nothing to answer
    found = losses(
        language, None, [QUESTIONS[row] for row in rows], [ANSWERS[row] for row in rows], prefix
    )
    expected = torch.stack([alone(language, None, row, prefix) for row in rows])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", [[], PREFIX])
def test_no_row_learns_from_another(dtype: torch.dtype, prefix: list[int]) -> None:
    language = tiny_llama()
    language.model.to(dtype)
    visual = images()
    found = losses(language, visual, QUESTIONS, ANSWERS, prefix)
    for row, loss in enumerate(found):
        (slope,) = torch.autograd.grad(loss, visual, retain_graph=True)
        others = [other for other in range(len(QUESTIONS)) if other != row]
        assert slope[row].abs().amax(dim=1).min() > 0
        assert not slope[others].any()


@pytest.mark.parametrize("prefix", [[], PREFIX])
def test_no_row_reads_another(prefix: list[int]) -> None:
    language, visual = tiny_llama(), images().detach()
    before = losses(language, visual, QUESTIONS, ANSWERS, prefix)
    for changed in range(len(QUESTIONS)):
        other = visual.clone()
        other[changed] += 1
        longer = [[*ids, 8, 30] if row == changed else ids for row, ids in enumerate(QUESTIONS)]
        for image, questions in ((other, QUESTIONS), (visual, longer)):
            after = losses(language, image, questions, ANSWERS, prefix)
            is_same = (after - before).abs() <= 1e-6 * before.abs()
            assert is_same.tolist() == [row != changed for row in range(len(QUESTIONS))]


class _Largest(TorchDispatchMode):
    """Note how many numbers the largest tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(item):
                self.found = max(self.found, item.numel())
        return out


def test_nothing_is_as_large_as_all_tokens_by_all_tokens() -> None:
    language, rows = tiny_llama(), 60
    visual = torch.randn(rows, 4, 32).requires_grad_()
    with _Largest() as largest:
        language.loss_from_ids(visual, [[5, 6]] * rows, [[7, 1]] * rows)[0].backward()
    tokens = rows * 7
    assert tokens * 32 <= largest.found < tokens * tokens


@contextmanager
def attribute(item: Any, name: str, value: Any) -> Iterator[None]:
    """Within the block, `item.name` is `value`."""
    old = getattr(item, name, None)
    setattr(item, name, value)
    try:
        yield
    finally:
        setattr(item, name, old)


def test_it_is_for_learning_and_for_one_process() -> None:
    language = tiny_llama()
    assert language._packs
    with torch.no_grad():
        assert not language._packs
    with attribute(language.model, "is_spread", True):
        assert not language._packs
    with attribute(language.model, "training", True):
        assert not language._packs
    assert language._packs


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("mistral", {"sliding_window": 4}),
        ("gemma2", {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4}),
        ("olmo2", {"num_key_value_heads": 2}),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    ],
)
def test_models_that_look_otherwise_are_read_as_before(name: str, more: dict[str, Any]) -> None:
    language = family(name, **more)
    assert not language._packs
    visual = images()
    total, _ = language.loss_from_ids(visual, QUESTIONS, ANSWERS)
    expected = sum(alone(language, visual, row, []) for row in range(len(QUESTIONS)))
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-4)


def test_bfloat16_is_no_further_from_float32_than_rows_alone() -> None:
    """The rounding of packed rows, loss and gradient, is that of the format."""
    exact, rough = tiny_llama(), tiny_llama()
    rough.model.to(torch.bfloat16)
    found = []
    for language in (exact, rough):
        visual = images()
        total, _ = language.loss_from_ids(visual, QUESTIONS, ANSWERS, prefix=PREFIX)
        total.backward()
        assert visual.grad is not None
        found.append((total.detach(), visual.grad))
    visual = images()
    plain = sum(alone(rough, visual, row, PREFIX) for row in range(len(QUESTIONS)))
    plain.backward()
    assert visual.grad is not None
    (total, grad), (rounded, rounded_grad) = found
    far = (visual.grad - grad).norm()
    assert abs(rounded - total) <= max(3 * abs(plain.detach() - total), 0.02 * total)
    assert (rounded_grad - grad).norm() <= 2 * far
