"""What must not change anything: longer padding, company in the batch, later words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_equations import DECODE_START, make_case

from clover.align.losses import LossSettings, alignment_losses
from clover.core.config import QFormerConfig
from clover.core.errors import CloverError
from clover.qformer.bridge import Bridge
from clover.qformer.tokenizer import TextTokenizer, Tokens
from tiny import Tiny, tiny_clover, write_tokenizer


def test_longer_padding_changes_no_loss() -> None:
    case = make_case([3, 6, 4], seed=3)
    padding = torch.zeros(3, 4, dtype=torch.long)
    # What stands under a padded place must not matter either.
    longer = Tokens(
        torch.cat([case.text.ids, padding + 7], dim=1), torch.cat([case.text.mask, padding], dim=1)
    )
    short, long = (
        alignment_losses(
            case.bridge,
            case.bridge.read_image(case.features),
            text,
            LossSettings(DECODE_START),
            negatives=case.negatives,
        ).parts
        for text in (case.text, longer)
    )
    for name, value in short.items():
        torch.testing.assert_close(value, long[name], msg=name)


def test_a_word_changes_no_row_before_it_in_the_caption_pass() -> None:
    case = make_case([6, 6], seed=4)
    qformer = case.bridge.qformer
    cache = qformer.encode_queries(case.bridge.read_image(case.features)).cache
    changed = case.text.ids.clone()
    changed[:, 3] = (changed[:, 3] % 9) + 1
    before, after = (
        qformer.decode_text(ids, case.text.mask, cache) for ids in (case.text.ids, changed)
    )
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])


def test_a_batch_of_eight_is_eight_batches_of_one(tiny: Tiny) -> None:
    model = tiny_clover(tiny.recipe)
    torch.manual_seed(0)
    features = torch.randn(8, model.encoder.num_tokens, model.encoder.width)
    questions = ["is this liver ?", "which tissue is shown in the image ?"] * 4
    together = model.visual_prefix(features, questions)
    for row in range(8):
        alone = model.visual_prefix(features[row : row + 1], questions[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone)


def test_the_prefix_depends_on_the_question_only_when_the_recipe_says_so(tiny: Tiny) -> None:
    recipe = tiny.recipe
    blind = recipe.model_copy(
        update={"tune": recipe.tune.model_copy(update={"instruction_aware": False})}
    )
    features = torch.randn(1, 16, 24, generator=torch.Generator().manual_seed(0))
    for chosen, is_aware in ((recipe, True), (blind, False)):
        model = tiny_clover(chosen)
        first, second = (
            model.visual_prefix(features, [text]) for text in ("is this liver ?", "describe")
        )
        assert torch.equal(first, second) != is_aware


@pytest.mark.parametrize(
    ("heads", "language_width", "count"),
    [(True, None, 186_705_470), (False, 2048, 187_262_464), (False, 4096, 188_837_376)],
)
def test_full_size_parameter_counts_are_the_published_ones(
    heads: bool, language_width: int | None, count: int
) -> None:
    with torch.device("meta"):
        bridge = Bridge(QFormerConfig(), language_width=language_width, has_alignment=heads)
    assert bridge.num_trainable() == count


def test_a_tokenizer_row_is_cls_words_sep_and_truncation_takes_the_named_side(
    tmp_path: Path,
) -> None:
    tokenizer = TextTokenizer(write_tokenizer(tmp_path / "tokenizer.json"))
    full = tokenizer(["liver colon kidney necrosis", "liver"], limit=32)
    assert full.ids[:, 0].tolist() == [tokenizer.start] * 2
    assert full.mask.sum(dim=1).tolist() == [6, 3]
    assert full.ids[1].tolist()[2:] == [tokenizer.end] + [tokenizer.pad] * 3
    right = tokenizer(["liver colon kidney necrosis"], limit=4)
    left = tokenizer(["liver colon kidney necrosis"], limit=4, side="left")
    assert tokenizer.decode(right.ids[0].tolist()) == "liver colon"
    assert tokenizer.decode(left.ids[0].tolist()) == "kidney necrosis"
    assert tokenizer.decode_start == tokenizer.vocab_size - 1


def test_a_tokenizer_that_is_none_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(CloverError, match=r"is not a tokenizer\.json"):
        TextTokenizer(path)
