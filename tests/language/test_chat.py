"""Plain chat of the frozen model, and the loop's small parts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clover.core.errors import CloverError
from clover.language import GenerationSettings
from clover.language.chat import chat_ids, complete
from clover.language.decoder_only import DecoderOnly
from clover.language.grouping import length_groups

from .tiny import tiny_llama

LONG = "describe the image with many cells and fibrosis in the colon"


def conversation(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": LONG}, {"role": "user", "content": question}]


def test_replies_do_not_depend_on_the_batch_or_the_shared_beginning(llama: DecoderOnly) -> None:
    batch = [conversation("is there necrosis ?"), conversation("what stain"), conversation("liver")]
    for how in (GenerationSettings(max_tokens=8), GenerationSettings(max_tokens=8, temperature=1)):
        together = complete(llama, batch, how, seeds=[1, 2, 3])
        alone = [
            complete(llama, [item], how, seeds=[seed])[0]
            for seed, item in enumerate(batch, start=1)
        ]
        assert together == alone


def test_equal_conversations_with_different_lengths_of_share_still_answer(
    llama: DecoderOnly,
) -> None:
    same = [conversation("liver")] * 2
    first, second = complete(llama, same, GenerationSettings(max_tokens=4))
    assert first == second


def test_token_counts_and_finish_reason_are_true(llama: DecoderOnly) -> None:
    reply = complete(llama, [conversation("liver")], GenerationSettings(max_tokens=2))[0]
    assert reply.prompt_tokens == len(chat_ids(llama, conversation("liver")))
    assert reply.completion_tokens <= 2
    longer = complete(llama, [conversation("liver")], GenerationSettings(max_tokens=60))[0]
    assert longer.finish_reason == ("stop" if longer.completion_tokens < 60 else "length")


def test_a_model_without_a_chat_template_is_named() -> None:
    language = tiny_llama()
    language.tokens.tokenizer.chat_template = None
    with pytest.raises(CloverError, match=r"^tiny-llama has no chat template"):
        complete(language, [conversation("liver")], GenerationSettings())


def padded(lengths: list[int], overhead: int, groups: list[list[int]]) -> int:
    return sum(len(g) * max(lengths[row] for row in g) + overhead for g in groups)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=7), st.integers(0, 40))
def test_length_groups_hold_every_row_once_and_never_cost_more_than_one_group(
    lengths: list[int], overhead: int
) -> None:
    groups = length_groups(lengths, overhead)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    everything, singles = [list(range(len(lengths)))], [[row] for row in range(len(lengths))]
    cost = padded(lengths, overhead, groups)
    assert cost <= padded(lengths, overhead, everything)
    assert cost <= padded(lengths, overhead, singles)


def test_one_long_row_is_parted_from_many_short_ones() -> None:
    assert length_groups([4, 90, 5, 4], overhead=10) == [[1], [0, 2, 3]]
    assert length_groups([4, 90, 5, 4], overhead=1000) == [[0, 1, 2, 3]]
