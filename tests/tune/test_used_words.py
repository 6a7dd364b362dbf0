"""Training only the words that are asked: the same weights, and nothing else touched."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from clover.core.config import OptimizerConfig
from clover.core.run import RunFolder
from clover.model import load_tokenizer
from clover.qformer import used_words
from clover.qformer.used_words import UsedPieces, UsedWords, only_words
from clover.training.loop import TrainingJob, train
from clover.tune.grounding import GroundingObjective
from clover.tune.objective import TuneObjective
from clover.vision.dataset import load_feature_set
from tiny import Tiny, tiny_clover


def test_rows_are_found_by_their_own_ids_and_others_are_refused() -> None:
    whole = nn.Embedding(6, 3)
    used = UsedWords(whole, torch.tensor([1, 4, 5]))
    ids = torch.tensor([[5, 1], [4, 4]])
    assert torch.equal(used(ids), whole(ids))
    with pytest.raises(IndexError):
        used(torch.tensor([2]))


@pytest.mark.parametrize("limit", [3, 4, 6, 50])
@pytest.mark.parametrize("is_by_words", [True, False])
def test_the_pieces_of_many_texts_are_those_of_each_read_by_itself(
    limit: int, is_by_words: bool, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(used_words, "_TEXTS_AT_ONCE", 5)
    tokenizer = load_tokenizer(tiny.recipe)
    assert tokenizer.is_by_words
    draw = random.Random(limit)
    words = ["fibrosis?", "Is", "necrosis", "seen", "\u0301", "a\tb", "[DEC]x", "", "mitoses-rich"]
    texts = [" ".join(draw.choices(words, k=draw.randint(0, 12))) for _ in range(60)]

    def encode(some: Sequence[str]) -> list[list[int]]:
        return [tokenizer([text], limit=limit, side="left").ids[0].tolist() for text in some]

    used = UsedPieces(encode, limit=limit, is_by_words=is_by_words)
    for text in texts:
        used.add(text)
    assert used.found() == {piece for row in encode(texts) for piece in row}


def test_words_and_sizes_are_those_of_the_records_read_one_by_one(tiny: Tiny) -> None:
    model = tiny_clover(tiny.recipe)
    data = load_feature_set(
        tiny.instructions, needs="question", encoder=model.encoder, cache=tiny.folder / "cache"
    )
    records = list(data.records)
    sizes = [len(r.answer or "") + len(r.question or "") // 2 for r in records]
    asked = [model.question_of(record) for record in records]
    tokens = model.question_tokens(asked)
    assert tokens is not None
    expected = {*tokens.ids.flatten().tolist(), model.tokenizer.pad}
    objective = TuneObjective(model, data)
    words = objective.words()
    assert words is not None and words.tolist() == sorted(expected)
    assert list(objective.sizes()) == list(TuneObjective(model, data).sizes()) == sizes


@pytest.mark.parametrize("kind", [GroundingObjective, TuneObjective])
def test_training_them_alone_gives_the_weights_of_training_all(
    kind: type[GroundingObjective] | type[TuneObjective], tiny: Tiny
) -> None:
    found = []
    for alone in (False, True):
        model = tiny_clover(tiny.recipe)
        qformer = model.bridge.qformer
        # A vocabulary that is much larger than what is asked, as a real one is.
        words = nn.Embedding(400, qformer.word_embedding.embedding_dim)
        with torch.no_grad():
            words.weight.copy_(torch.linspace(-1, 1, words.weight.numel()).view_as(words.weight))
        before = words.weight.detach().clone()
        qformer.word_embedding = words
        data = load_feature_set(
            tiny.instructions, needs="question", encoder=model.encoder, cache=tiny.folder / "cache"
        )
        objective = kind(model, data)
        config = OptimizerConfig(steps=4, batch_size=4, learning_rate=1e-2, weight_decay=0.5)
        job = TrainingJob(
            "tune",
            config,
            RunFolder(tiny.folder / f"{kind.__name__}{alone}"),
            model.device,
            0,
            "key",
        )
        ids = TuneObjective(model, data).words()
        assert ids is not None and 4 < len(ids) < 200
        with only_words(qformer, ids) if alone else nullcontext():
            assert isinstance(qformer.word_embedding, UsedWords) == alone
            train(objective, job)
        assert qformer.word_embedding is words
        others = torch.ones(400, dtype=torch.bool)
        others[ids] = False
        assert torch.equal(words.weight[others], before[others])
        assert not torch.equal(words.weight[ids], before[ids])
        found.append({name: item.detach() for name, item in model.bridge.named_parameters()})
    for name, item in found[0].items():
        torch.testing.assert_close(found[1][name], item, rtol=1e-4, atol=1e-5, msg=name)


def test_what_does_not_learn_or_is_nearly_all_stays_whole(tiny: Tiny) -> None:
    qformer = tiny_clover(tiny.recipe).bridge.qformer
    whole = qformer.word_embedding
    with only_words(qformer, torch.arange(whole.num_embeddings)):
        assert qformer.word_embedding is whole
    whole.requires_grad_(False)
    with only_words(qformer, torch.tensor([0, 1])):
        assert qformer.word_embedding is whole
