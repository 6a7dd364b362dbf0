"""Rows at different stages in one batch against the same rows alone."""

from __future__ import annotations

import pytest
import torch
from tests.language.tiny import QUESTIONS, tiny_llama, tiny_t5
from torch import Tensor

from clover.language.decoder_only import DecoderOnly
from clover.language.protocol import GenerationSettings
from clover.language.rows import RowBatch, can_share_a_batch

LENGTH = 12


@pytest.fixture(scope="module")
def llama() -> DecoderOnly:
    return tiny_llama()


def prompts(llama: DecoderOnly) -> list[list[int]]:
    return [llama.instruction_ids(question) for question in QUESTIONS]


def embeds(llama: DecoderOnly, ids: list[int]) -> Tensor:
    return llama.word_embeddings(torch.tensor(ids))


def alone(llama: DecoderOnly, ids: list[int]) -> list[int]:
    settings = GenerationSettings(max_tokens=LENGTH, min_tokens=LENGTH)
    return llama.generate_from_ids(None, [ids], settings)[0]


def greedy(llama: DecoderOnly, logits: Tensor) -> list[int]:
    logits[:, list(llama.tokens.stop_ids)] = -torch.inf
    return logits.argmax(dim=-1).tolist()


def test_rows_that_come_and_go_write_what_they_would_alone(llama: DecoderOnly) -> None:
    ids = [*prompts(llama), prompts(llama)[0]]
    batch = RowBatch(llama, 4)
    written: dict[int, list[int]] = {}
    order: list[int] = []
    # One row comes every third step: the first are in mid-sentence when the last is read.
    for step in range(100):
        if step % 3 == 0 and step // 3 < len(ids):
            number = step // 3
            first = greedy(llama, batch.admit([[]], [embeds(llama, ids[number])]))
            written[number] = first
            order.append(number)
        for place in reversed(range(len(order))):
            if len(written[order[place]]) == LENGTH:
                last = batch.remove(place)
                order[place] = order[last]
                order.pop()
        if not order:
            break
        logits = batch.step([written[number][-1] for number in order])
        for number, token in zip(order, greedy(llama, logits), strict=True):
            written[number].append(token)
    assert written == {number: alone(llama, row) for number, row in enumerate(ids)}
    assert len(batch) == 0


def test_rows_admitted_together_read_as_they_would_alone(llama: DecoderOnly) -> None:
    ids = prompts(llama)
    together = RowBatch(llama, 3).admit([[]] * 3, [embeds(llama, row) for row in ids])
    for number, row in enumerate(ids):
        single = RowBatch(llama, 1).admit([[]], [embeds(llama, row)])
        torch.testing.assert_close(together[number], single[0], atol=1e-5, rtol=1e-5)


def test_a_beginning_that_was_kept_need_not_be_read_again(llama: DecoderOnly) -> None:
    ids = prompts(llama)[2]
    batch = RowBatch(llama, 2)
    whole = batch.admit([[]], [embeds(llama, ids)])
    parts = [batch.copy_out(0, 0, 2), batch.copy_out(0, 2, 5)]
    batch.remove(0)
    again = batch.admit([parts, []], [embeds(llama, ids[5:]), embeds(llama, ids)])
    torch.testing.assert_close(again[0], whole[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again[1], whole[0], atol=1e-5, rtol=1e-5)


def test_long_rows_make_the_buffers_grow_and_keep_what_is_in_them(llama: DecoderOnly) -> None:
    ids = (prompts(llama)[1] * 20)[:100]
    batch = RowBatch(llama, 3)
    batch.admit([[]], [embeds(llama, ids[:40])])
    for token in ids[40:]:
        grown = batch.step([token])
    torch.testing.assert_close(
        grown, RowBatch(llama, 1).admit([[]], [embeds(llama, ids)]), atol=1e-4, rtol=1e-4
    )


def test_only_models_that_see_the_whole_row_share_a_batch(llama: DecoderOnly) -> None:
    assert can_share_a_batch(llama)
    assert not can_share_a_batch(tiny_t5())
    windowed = tiny_llama()
    windowed.model.config.sliding_window = 16
    assert not can_share_a_batch(windowed)


def test_rows_behind_beginnings_that_are_held_once_read_as_behind_their_own(
    llama: DecoderOnly,
) -> None:
    """Two beginnings and a row without any, in one batch, through admission, steps and leaving."""
    ids = prompts(llama)
    wholes = [ids[0], ids[1], ids[2], ids[1]]
    shares: list[int | None] = [0, 1, None, 1]
    apart = RowBatch(llama, 4)
    starts = {}
    for number, row in ((0, ids[0][:3]), (1, ids[1][:2])):
        apart.admit([[]], [embeds(llama, row)])
        starts[number] = apart.copy_out(0, 0, len(row))
        apart.remove(0)
    batch = RowBatch(llama, 4)
    assert batch.can_share
    assert [batch.hold(starts[number]) for number in (0, 1)] == [0, 1]
    rest = [
        row if share is None else row[starts[share][0][0].shape[1] :]
        for row, share in zip(wholes, shares, strict=True)
    ]
    expected = apart.admit([[]] * 4, [embeds(llama, row) for row in wholes])
    found = batch.admit([[]] * 4, [embeds(llama, row) for row in rest], shares)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert batch.lengths == apart.lengths == [len(row) for row in wholes]
    for token in (5, 6, 7):
        torch.testing.assert_close(
            batch.step([token] * 4), apart.step([token] * 4), atol=1e-5, rtol=1e-5
        )
    # The last row, behind the second beginning, moves into the first one's place.
    assert batch.remove(0) == apart.remove(0) == 3
    torch.testing.assert_close(batch.step([5, 6, 7]), apart.step([5, 6, 7]), atol=1e-5, rtol=1e-5)
    own = batch.copy_out(0, 2, 6)
    for mine, theirs in zip(own, apart.copy_out(0, 2, 6), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
