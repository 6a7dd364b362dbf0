"""Visual tokens between two words: how they are scored, and how far they are moved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clover.core.config import load_recipe
from clover.core.errors import CloverError
from clover.language.words import Words
from clover.model import load
from tiny import Tiny, tiny_clover, tiny_recipe

QUESTIONS = ["which tissue is shown ?", "is this liver ?"]


@pytest.fixture
def words() -> Words:
    """Five words of a language model of 16, 6 wide."""
    torch.manual_seed(0)
    every = torch.randn(16, 6) + 1.0
    ids = torch.tensor([2, 3, 7, 11, 13])
    return Words(ids, every[ids], every.mean(dim=0))


def test_scores_are_products_as_seen_from_the_mean_word(words: Words) -> None:
    visual = torch.randn(2, 3, 6)
    found = words.scores(visual)
    for row in range(2):
        for place in range(3):
            for column in range(5):
                seen = visual[row, place] - words.mean
                expected = float((seen * (words.embeddings[column] - words.mean)).sum())
                assert float(found[row, place, column]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_token_goes_its_share_of_the_way_to_the_word_it_points_at(
    words: Words, share: float
) -> None:
    visual = torch.randn(4, 3, 6)
    found = words.pulled(visual, share)
    for row in range(4):
        for place in range(3):
            token = visual[row, place]
            scores = [float((token - words.mean) @ (w - words.mean)) for w in words.embeddings]
            word = words.embeddings[scores.index(max(scores))]
            expected = token + share * (word - token)
            torch.testing.assert_close(found[row, place], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_with_spellings_all_places_go_to_the_words_of_the_likeliest_one(
    words: Words, share: float
) -> None:
    spellings = torch.tensor([[0, 1, 4], [0, 2, 4], [3, 0, 4], [1, 4, 4]])
    spelling = replace(words, spellings=spellings)
    visual, differ = 0.3 * torch.randn(40, 3, 6), 0
    found, alone = spelling.pulled(visual, share), words.pulled(visual, share)
    for row in range(40):
        chances = torch.stack([words.scores(visual)[row, place].softmax(0) for place in range(3)])
        products = []
        for one in spellings.tolist():
            product = 1.0
            for place, word in enumerate(one):
                product *= float(chances[place, word])
            products.append(product)
        best = words.embeddings[spellings[products.index(max(products))]]
        expected = visual[row] + share * (best - visual[row])
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-6)
        differ += not torch.equal(found[row], alone[row])
    assert differ > 5  # word by word, several of these are no answer


def test_bfloat16_tokens_stay_bfloat16_and_are_scored_in_float32(words: Words) -> None:
    visual = torch.randn(2, 3, 6).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert words.scores(visual).dtype == torch.float32
        assert words.pulled(visual, 0.5).dtype == torch.bfloat16


def test_a_model_pulls_what_it_was_told_and_only_once_it_has_learnt(
    tiny: Tiny, tmp_path: Path
) -> None:
    model = tiny_clover(tiny_recipe(tiny.folder, qformer={"dropout": 0.0}))
    model.details["words"] = [4, 9, 12]
    model.save(tmp_path / "model")
    features = model.encode(tiny.image()).expand(2, -1, -1)

    plain = load(tmp_path / "model", precision="float32")
    assert plain.words is None, "nothing is looked up that is not asked for"
    evaluate = plain.recipe.evaluate.model_copy(update={"word_pull": 1.0})
    plain.recipe = plain.recipe.model_copy(update={"evaluate": evaluate})
    plain.save(tmp_path / "pulled")
    pulled = load(tmp_path / "pulled", precision="float32")
    assert pulled.words is not None and pulled.words.ids.tolist() == [4, 9, 12]
    assert pulled.words.spellings is None, "a model from before spellings were stated"
    plain.details["spellings"] = [[0, 1, 2, 2]]
    plain.save(tmp_path / "spelt")
    spelt = load(tmp_path / "spelt", precision="float32").words
    assert spelt is not None and spelt.spellings is not None
    assert spelt.spellings.tolist() == [[0, 1, 2, 2]]
    with torch.no_grad():
        before = plain.visual_prefix(features, QUESTIONS)
        after = pulled.visual_prefix(features, QUESTIONS)
        pulled.bridge.train()
        training = pulled.visual_prefix(features, QUESTIONS)
    assert not torch.equal(before, after)
    torch.testing.assert_close(training, before, msg="training sees what the bridge wrote")
    nearest = pulled.words.scores(before).argmax(dim=-1)
    torch.testing.assert_close(after, pulled.words.embeddings[nearest])


def test_a_model_that_was_never_taught_to_spell_is_left_alone(tiny: Tiny) -> None:
    model = tiny_clover(tiny.recipe)
    model.bridge.eval()
    features = model.encode(tiny.image())
    with torch.no_grad():
        before = model.visual_prefix(features, QUESTIONS[:1])
        evaluate = model.recipe.evaluate.model_copy(update={"word_pull": 0.5})
        model.recipe = model.recipe.model_copy(update={"evaluate": evaluate})
        assert torch.equal(model.visual_prefix(features, QUESTIONS[:1]), before)


def test_the_share_has_limits() -> None:
    with pytest.raises(CloverError, match=r"word_pull.*1\.5"):
        load_recipe("phantom", ["evaluate.word_pull=1.5"])
