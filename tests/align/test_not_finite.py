"""Similarities that are not finite end in the loop's own line, before anything is drawn by them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from clover.align.contrast import Similarity
from clover.align.match import negative_weights, sample_negatives
from clover.align.objective import AlignObjective
from clover.align.run import align
from clover.core.config import Recipe
from clover.core.errors import CloverError
from clover.core.run import RunFolder
from clover.model import build_bridge, load_tokenizer
from clover.training.device import choose_device
from clover.training.loop import TrainingJob, train
from clover.vision.dataset import load_feature_set
from clover.vision.encoder import load_encoder
from tiny import Tiny, tiny_recipe
from together import start_together

LINE = r"align: the loss of step \d+ is nan; its samples are [\w-]+, [\w-]+.*; lower align\.learn"


def with_broken_head(recipe: Recipe, tiny: Tiny, folder: Path) -> None:
    """Train with a text vector that is nan: matching and caption alone never read it."""
    encoder, tokenizer = load_encoder(recipe.encoder), load_tokenizer(recipe)
    bridge = build_bridge(recipe, encoder, tokenizer, has_alignment=True)
    with torch.no_grad():
        bridge.alignment.text_projection.bias.fill_(torch.nan)
    data = load_feature_set(
        tiny.captions, needs="caption", encoder=encoder, cache=tiny.folder / "cache"
    )
    device = choose_device("cpu", recipe.precision)
    objective = AlignObjective(bridge, data, tokenizer, recipe.align, device)
    train(objective, TrainingJob("align", recipe.align, RunFolder(folder), device, 0, "key"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "settings", [{}, {"gradient_chunk": 2}, {"gather": "detached", "ignore_duplicates": True}]
)
def test_a_training_that_blows_up_names_the_batch_with_the_default_losses(
    precision: str, settings: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    wild = {"learning_rate": 1e10, "clip_norm": None, "warmup_steps": 0, **settings}
    recipe = tiny_recipe(tiny.folder, align=wild).model_copy(update={"precision": precision})
    with pytest.raises(CloverError, match=LINE):
        align(recipe, captions=tiny.captions, out=tmp_path, cache=tiny.folder / "cache")


@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("which", [["match"], ["match", "caption"], ["contrast"]])
def test_so_do_losses_that_only_draw_by_them(
    which: list[str], chunk: int, tiny: Tiny, tmp_path: Path
) -> None:
    recipe = tiny_recipe(tiny.folder, align={"losses": which, "gradient_chunk": chunk})
    with pytest.raises(CloverError, match=LINE):
        with_broken_head(recipe, tiny, tmp_path)


@pytest.mark.alone  # forks
def test_of_several_processes_one_says_it(tiny: Tiny, tmp_path: Path) -> None:
    codes, errors = start_together(
        lambda _: with_broken_head(tiny.recipe, tiny, tmp_path / "run"), tmp_path / "said"
    )
    assert sorted(map(str, codes)) == ["1", "2"] and len(errors) == 1
    assert re.search(LINE, errors[0])


def test_finite_similarities_draw_as_ever_and_others_draw_something() -> None:
    torch.manual_seed(0)
    finite = Similarity(torch.randn(4, 6) / 0.07, torch.randn(4, 6) / 0.07)
    for found, matrix in zip(
        negative_weights(finite, offset=2),
        (finite.text_to_image, finite.image_to_text),
        strict=True,
    ):
        masked = matrix.clone()
        masked[range(4), range(2, 6)] = -10000.0
        assert torch.equal(found, masked.softmax(dim=1))  # bit for bit
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken = Similarity(*(matrix.clone() for matrix in (finite.image_to_text,) * 2))
        broken.image_to_text[1] = broken.text_to_image[:, 3] = bad
        drawn = sample_negatives(broken, offset=2)
        assert min(drawn.image_for_text) >= 0 and max(drawn.text_for_image) < 6
