"""Stage 2 as a whole: it learns to look, starts from stage 1, and leaves a model folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clover.align.run import align
from clover.core.errors import CloverError
from clover.core.files import read_json
from clover.core.run import RunFolder
from clover.model import load, load_bridge
from clover.tune.run import tune
from tiny import QUESTION, TISSUES, Tiny, tiny_clover, tiny_recipe


def test_a_tuned_model_names_the_tissue_and_a_blind_one_cannot(tiny: Tiny, tmp_path: Path) -> None:
    settings = {"steps": 150, "batch_size": 8, "learning_rate": 5e-3}
    recipe = tiny_recipe(tiny.folder, tune=settings, qformer={"dropout": 0.0})
    found = tune(
        recipe,
        instructions=tiny.instructions,
        out=tmp_path / "model",
        run=tmp_path / "run",
        cache=tiny.folder / "cache",
    )
    model = load(found.model)
    images = {tissue: model.encode(tiny.image(tissue)) for tissue in TISSUES}
    settings_ = model.default_settings()
    seen = {
        tissue: model.answer_features(features, [QUESTION], settings_)[0]
        for tissue, features in images.items()
    }
    assert seen == {tissue: tissue for tissue in TISSUES}
    blind = model.answer_features(torch.zeros(3, 16, 24), [QUESTION] * 3, settings_)
    assert len(set(blind)) == 1
    rows = RunFolder(tmp_path / "run").metrics("tune")
    assert rows[-1]["loss"] < rows[0]["loss"] / 2


def test_it_starts_from_stage_1_and_says_from_which(tiny: Tiny, tmp_path: Path) -> None:
    stage1 = align(
        tiny.recipe, captions=tiny.captions, out=tmp_path / "a", cache=tiny.folder / "cache"
    ).weights
    # A learning rate of next to nothing: what comes out is what went in.
    recipe = tiny_recipe(
        tiny.folder, tune={"steps": 1, "learning_rate": 1e-12, "weight_decay": 0.0}
    )
    out = tmp_path / "model"
    tune(
        recipe,
        instructions=tiny.instructions,
        out=out,
        run=tmp_path / "t",
        cache=tiny.folder / "cache",
        start=stage1,
    )
    before, after = load_file(str(stage1)), load_file(str(out / "bridge.safetensors"))
    shared = set(before) & set(after)
    assert {"qformer.query_tokens", "vision_norm.bias"} <= shared
    for name in shared:
        torch.testing.assert_close(after[name], before[name], atol=1e-6, rtol=0, msg=name)
    assert {name.split(".")[0] for name in set(after) - shared} == {"projection"}
    assert read_json(out / "config.json")["stage_1"] is not None


def test_stage_1_of_another_size_is_refused_in_one_line(tiny: Tiny, tmp_path: Path) -> None:
    stage1 = align(
        tiny.recipe,
        captions=tiny.captions,
        out=tmp_path,
        cache=tiny.folder / "cache",
    ).weights
    other = tiny_clover(tiny_recipe(tiny.folder, qformer={"num_queries": 6})).bridge
    with pytest.raises(CloverError, match=r"query_tokens is \[1, 4, 32\], the recipe wants"):
        load_bridge(other, stage1, without=("heads.", "projection."))
    deeper = tiny_clover(tiny_recipe(tiny.folder, qformer={"num_layers": 3})).bridge
    with pytest.raises(CloverError, match="does not fit: missing"):
        load_bridge(deeper, stage1, without=("heads.", "projection."))


def test_the_loss_is_the_sum_over_samples_whatever_the_batch(tiny: Tiny) -> None:
    model = tiny_clover(tiny.recipe)
    torch.manual_seed(0)
    features = torch.randn(6, 16, 24)
    questions = [QUESTION, "is this liver ?", "describe the image"] * 2
    answers = ["liver", "no", "the image shows colon with many cells"] * 2
    total, count = model.loss(features, questions, answers)
    parts = [
        model.loss(features[i : i + 1], questions[i : i + 1], answers[i : i + 1]) for i in range(6)
    ]
    torch.testing.assert_close(total, torch.stack([part[0] for part in parts]).sum())
    assert int(count) == sum(int(part[1]) for part in parts)
    # Words of each answer and its end: the question carries no loss.
    assert int(count) == 2 * (2 + 2 + 8)


def test_a_word_embedding_that_does_not_learn_stays_and_is_not_counted(
    tiny: Tiny, tmp_path: Path
) -> None:
    qformer = {"train_word_embedding": False}
    recipe = tiny_recipe(tiny.folder, qformer=qformer, tune={"steps": 3})
    stage1 = align(
        tiny_recipe(tiny.folder, qformer=qformer, align={"steps": 3}),
        captions=tiny.captions,
        out=tmp_path / "a",
        cache=tiny.folder / "cache",
    ).weights
    out = tmp_path / "model"
    tune(
        recipe,
        instructions=tiny.instructions,
        out=out,
        run=tmp_path / "t",
        cache=tiny.folder / "cache",
        start=stage1,
    )
    fresh = tiny_clover(recipe).bridge
    name = "qformer.word_embedding.weight"
    start = fresh.state_dict()[name]
    for file in (stage1, out / "bridge.safetensors"):
        found = load_file(str(file))
        assert torch.equal(found[name], start)
        assert not torch.equal(
            found["qformer.query_tokens"], fresh.state_dict()["qformer.query_tokens"]
        )
    everything = tiny_clover(tiny_recipe(tiny.folder)).bridge.num_trainable()
    assert read_json(out / "config.json")["trainable_parameters"] == everything - start.numel()


def test_questions_are_cut_to_the_positions_there_are(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tiny.folder,
        qformer={"max_positions": 5},
        tune={"steps": 2, "max_question_tokens": 128, "grounding_steps": 1},
    )
    found = tune(
        recipe,
        instructions=tiny.instructions,
        out=tmp_path / "model",
        run=tmp_path / "run",
        cache=tiny.folder / "cache",
    )
    assert found.is_finished
    assert load(found.model).ask(tiny.image(), "which tissue is shown here , do you think ?").text
