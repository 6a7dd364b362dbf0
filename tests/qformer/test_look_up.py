"""Words that a step looks up once get the gradient of all its look-ups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from clover.core.config import QFormerConfig
from clover.qformer.model import QFormer
from clover.qformer.used_words import looked_up_once

WORDS = 40


def qformer() -> QFormer:
    torch.manual_seed(0)
    config = QFormerConfig(
        hidden_size=8,
        num_layers=2,
        num_heads=2,
        intermediate_size=16,
        num_queries=2,
        encoder_width=6,
        vocab_size=WORDS,
        dropout=0.0,
    )
    return QFormer(config)


def passes(module: QFormer, ids: Tensor) -> None:
    """Two look-ups, each with a backward of its own, and the head's use of all words."""
    for rows in (ids, ids.flip(1)):
        module.encode_text(rows, torch.ones_like(rows)).square().sum().backward()


@pytest.mark.parametrize("reads_all_words", [False, True])
def test_the_gradient_is_that_of_all_look_ups(reads_all_words: bool) -> None:
    ids = torch.tensor([[3, 1, 7], [7, 7, 39]])
    plain, once = qformer(), qformer()
    for module in (plain, once):
        if reads_all_words:
            module.word_embedding.weight.square().sum().backward()
    passes(plain, ids)
    with looked_up_once(once, torch.cat([ids.flatten(), torch.tensor([5])])):
        passes(once, ids)
    assert once.look_up is None
    for (name, wanted), found in zip(plain.named_parameters(), once.parameters(), strict=True):
        if wanted.grad is None:
            assert found.grad is None, name
        else:
            assert found.grad is not None, name
            torch.testing.assert_close(found.grad, wanted.grad, msg=name)


def test_no_look_up_writes_a_gradient_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    module, ids = qformer(), torch.tensor([[3, 1, 7]])
    monkeypatch.setattr(nn.Embedding, "forward", lambda *_: pytest.fail("read from the whole"))
    with looked_up_once(module, ids):
        passes(module, ids)
        assert module.word_embedding.weight.grad is None


def test_a_step_that_fails_leaves_nothing() -> None:
    module, ids = qformer(), torch.tensor([[3, 1, 7]])
    with pytest.raises(ZeroDivisionError), looked_up_once(module, ids):
        passes(module, ids)
        raise ZeroDivisionError
    assert module.look_up is None and module.word_embedding.weight.grad is None


def test_a_word_that_was_not_named_is_refused() -> None:
    module, ids = qformer(), torch.tensor([[3, 1, 7]])
    with looked_up_once(module, ids), pytest.raises(IndexError):
        passes(module, ids + 1)


def test_words_that_do_not_learn_are_read_as_they_are() -> None:
    module, ids = qformer(), torch.tensor([[3, 1, 7]])
    module.word_embedding.requires_grad_(False)
    with looked_up_once(module, ids):
        assert module.look_up is None
        passes(module, ids)
    assert module.word_embedding.weight.grad is None
