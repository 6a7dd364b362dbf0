"""Grounding and the calibrated start: what they compute, and that they resume exactly."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from clover.core.run import RunFolder
from clover.qformer.calibrate import calibrate_image
from clover.tune.grounding import GroundingObjective
from clover.tune.run import tune
from clover.vision.dataset import load_feature_set
from tiny import QUESTION, TISSUES, Tiny, tiny_clover, tiny_recipe


def objective(tiny: Tiny) -> GroundingObjective:
    model = tiny_clover(tiny.recipe)
    data = load_feature_set(
        tiny.instructions, needs="question", encoder=model.encoder, cache=tiny.folder / "cache"
    )
    return GroundingObjective(model, data)


def test_targets_are_the_answers_tokens_without_the_end(tiny: Tiny) -> None:
    grounding = objective(tiny)
    answer = next(iter(TISSUES))
    row = grounding.targets([answer])[0]
    named = {int(grounding.vocabulary[place]) for place in row.nonzero().flatten()}
    assert named == set(grounding.model.language.answer_ids(answer)[:-1])
    assert float(row.sum()) == 1.0


def test_loss_is_the_cross_entropy_of_each_query_averaged(tiny: Tiny) -> None:
    grounding = objective(tiny)
    batch = grounding.collate([0, 1])
    with torch.no_grad():
        found = grounding.losses(batch)
        visual = grounding.model.visual_prefix(batch.features, batch.questions)
    mean, _ = grounding.model.language.embedding_statistics()
    words = grounding.model.language.word_embeddings(grounding.vocabulary) - mean
    total = 0.0
    for row, answer in enumerate(batch.answers):
        tokens = set(grounding.model.language.answer_ids(answer)[:-1])
        for query in visual[row]:
            chances = torch.softmax(words @ (query - mean), dim=0)
            for place, token in enumerate(grounding.vocabulary.tolist()):
                if token in tokens:
                    total -= float(chances[place].log()) / len(tokens) / len(visual[row])
    torch.testing.assert_close(float(found.sum), total, rtol=1e-4, atol=1e-4)
    assert float(found.count) == 2


def test_grounding_names_the_tissue_before_the_language_model_is_asked(
    tiny: Tiny, tmp_path: Path
) -> None:
    settings = {
        "grounding_steps": 120,
        "grounding_batch_size": 8,
        "grounding_learning_rate": 5e-3,
        "steps": 1,
        "learning_rate": 1e-12,
    }
    recipe = tiny_recipe(tiny.folder, tune=settings, qformer={"dropout": 0.0, "calibrate": 8})
    paths = {"instructions": tiny.instructions, "cache": tiny.folder / "cache"}
    first = tune(recipe, out=tmp_path / "a", run=tmp_path / "run", **paths)
    rows = RunFolder(tmp_path / "run").metrics("ground")
    assert rows[-1]["loss"] < rows[0]["loss"] / 2

    from clover.model import load

    model = load(first.model)
    grounding = GroundingObjective(model, objective(tiny).data)
    for tissue in TISSUES:
        with torch.no_grad():
            visual = model.visual_prefix(model.encode(tiny.image(tissue)), [QUESTION])[0]
        scores = ((visual - grounding._mean) @ grounding._words.t()).mean(dim=0)
        assert int(grounding.vocabulary[scores.argmax()]) in model.language.answer_ids(tissue)

    # A run that lost its last stage grounds from its checkpoint and ends at the same weights.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "tune")
    second = tune(recipe, out=tmp_path / "b", run=tmp_path / "run", **paths)
    assert (second.model / "bridge.safetensors").read_bytes() == (
        first.model / "bridge.safetensors"
    ).read_bytes()


def test_calibration_gives_each_channel_mean_zero_and_unit_spread(tiny: Tiny) -> None:
    grounding = objective(tiny)
    bridge = grounding.model.bridge
    features = grounding.data.features(range(8))
    calibrate_image(bridge, features)
    normed = bridge.vision_norm(features).flatten(0, 1)
    torch.testing.assert_close(normed.mean(dim=0), torch.zeros(24), atol=1e-4, rtol=0)
    spread = normed.std(dim=0)
    assert float((spread - 1).abs().max().detach()) < 1e-2
