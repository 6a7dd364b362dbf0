"""Grounding and the calibrated start: what they compute, and that they resume exactly."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import clover
from clover.core.config import load_recipe
from clover.core.errors import CloverError
from clover.core.run import RunFolder
from clover.qformer.calibrate import calibrate_image
from clover.tune.grounding import GroundingObjective, refit_projection
from clover.tune.objective import KeptSpelling, TuneObjective
from clover.tune.run import tune
from clover.vision.dataset import load_feature_set
from tiny import QUESTION, TISSUES, Tiny, tiny_clover, tiny_recipe


def objective(tiny: Tiny, **settings: Any) -> GroundingObjective:
    model = tiny_clover(tiny.recipe)
    data = load_feature_set(
        tiny.instructions, needs="question", encoder=model.encoder, cache=tiny.folder / "cache"
    )
    return GroundingObjective(model, data, **settings)


def test_targets_spell_the_answer_and_then_fill(tiny: Tiny) -> None:
    grounding = objective(tiny)
    answer = next(iter(TISSUES))
    spelt = grounding.words.ids[grounding.targets([answer])[0]].tolist()
    tokens = grounding.model.language.text_tokens(" " + answer)
    (filler,) = grounding.model.language.text_tokens(" -")
    assert spelt == tokens + [filler] * (grounding.num_places - len(tokens))


@pytest.mark.parametrize("anchor", [0.0, 0.3])
def test_loss_is_cross_entropy_and_distance_of_each_place(tiny: Tiny, anchor: float) -> None:
    grounding = objective(tiny, anchor=anchor)
    batch = grounding.collate([0, 1])
    with torch.no_grad():
        found = grounding.losses(batch)
        visual = grounding.model.visual_prefix(batch.features, batch.questions)
    language = grounding.model.language
    mean, _ = language.embedding_statistics()
    words = language.word_embeddings(grounding.words.ids)
    total = 0.0
    for row, answer in enumerate(batch.answers):
        tokens = language.text_tokens(" " + answer)
        for place, query in enumerate(visual[row]):
            token = tokens[place] if place < len(tokens) else language.text_tokens(" -")[0]
            chances = torch.softmax((words - mean) @ (query - mean), dim=0)
            total -= float(chances[grounding.words.ids.tolist().index(token)].log())
            own = language.word_embeddings(torch.tensor([token]))[0]
            total += anchor * float((query - own).square().sum())
    torch.testing.assert_close(float(found.sum), total / len(visual[0]), rtol=1e-4, atol=1e-4)
    assert float(found.count) == 2


def test_questions_that_share_an_image_are_answered_as_if_alone(tiny: Tiny) -> None:
    grounding = objective(tiny, together=2)
    batch = grounding.collate([0, 1, 2])
    assert batch.features.shape[0] == 3
    assert len(batch.questions) == 6
    model = grounding.model
    with torch.no_grad():
        shared = model.visual_prefix(batch.features, batch.questions)
        alone = model.visual_prefix(batch.features.repeat_interleave(2, dim=0), batch.questions)
    torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-5)
    for group in grounding._groups:
        assert len({grounding.data.digests[index] for index in group}) == 1
    # Nothing is left out: every question stands in a group.
    assert {index for group in grounding._groups for index in group} == set(
        range(len(grounding.data.records))
    )


def test_answers_longer_than_the_visual_tokens_are_left_to_the_language_model(tiny: Tiny) -> None:
    grounding = objective(tiny)
    grounding.data.records = records = list(grounding.data.records)
    records[0] = records[0].model_copy(update={"answer": "liver " * (grounding.num_places + 1)})
    again = GroundingObjective(grounding.model, grounding.data)
    assert 0 not in {index for group in again._groups for index in group}
    assert again.num_samples() == len(records) - 1


def test_a_rare_question_is_asked_more_often_but_never_more_than_the_commonest(tiny: Tiny) -> None:
    found = objective(tiny)
    found.data.records = records = list(found.data.records)
    for index, record in enumerate(records):
        question = "is there necrosis ?" if index == 0 else QUESTION
        records[index] = record.model_copy(update={"question": question})

    def asked(repeat: int) -> Counter[int]:
        groups = GroundingObjective(found.model, found.data, repeat=repeat)._groups
        return Counter(index for group in groups for index in group)

    assert asked(3) == {0: 3, **dict.fromkeys(range(1, len(records)), 1)}
    assert asked(10_000)[0] == len(records) - 1
    expected = GroundingObjective(found.model, found.data, repeat=3)._groups
    again = GroundingObjective(found.model, found.data)
    again.group(3)
    assert again._groups == expected


@pytest.mark.parametrize("together", [1, 3])
def test_groups_are_those_made_of_the_records_one_by_one(tiny: Tiny, together: int) -> None:
    found = objective(tiny, together=together, repeat=2, seed=3)
    records = list(found.data.records)
    chance = random.Random(3)
    asked = Counter(record.question for record in records)
    by_image = dict[str, list[int]]()
    for index, record in enumerate(records):
        if record.answer in found._spelt:
            times = min(2, max(asked.values()) // asked[record.question])
            by_image.setdefault(found.data.digests[index], []).extend([index] * times)
    expected = []
    for rows in by_image.values():
        chance.shuffle(rows)
        rows += [rows[place % len(rows)] for place in range(-len(rows) % together)]
        expected += [rows[i : i + together] for i in range(0, len(rows), together)]
    assert found._groups == expected


def test_rare_questions_may_come_more_often_only_once_the_others_are_known(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grouped: list[int] = []
    group = GroundingObjective.group

    def noted(self: GroundingObjective, repeat: int) -> None:
        grouped.append(repeat)
        group(self, repeat)

    monkeypatch.setattr(GroundingObjective, "group", noted)
    steps = {"grounding_steps": 2, "anchoring_steps": 2, "grounding_batch_size": 4, "steps": 1}
    recipe = tiny_recipe(tiny.folder, tune=steps | {"anchoring_repeat": 5})
    paths = {"instructions": tiny.instructions, "cache": tiny.folder / "cache"}
    tune(recipe, out=tmp_path / "model", run=tmp_path / "run", **paths)
    assert grouped == [1, 5]


def test_a_filler_of_several_tokens_is_refused(tiny: Tiny) -> None:
    with pytest.raises(CloverError, match="grounding_filler 'liver colon' is 2 tokens"):
        objective(tiny, filler="liver colon")


def test_refit_is_the_ridge_solution(tiny: Tiny) -> None:
    grounding = objective(tiny)
    model = grounding.model
    batch = grounding.collate(range(grounding.num_samples()))
    with torch.no_grad():
        hidden = model.visual_hidden(batch.features, batch.questions).flatten(0, 1)
    words = model.language.word_embeddings(grounding.words.ids)
    wanted = words[grounding.targets(batch.answers)].flatten(0, 1)
    share = refit_projection(grounding, batch_size=4)
    projection = model.bridge.projection
    assert projection is not None

    def cost(weight: torch.Tensor, bias: torch.Tensor) -> float:
        rest = (hidden @ weight.detach().t() + bias.detach() - wanted).square().sum()
        return float(rest + 1e-4 * len(hidden) * weight.detach().square().sum())

    best = cost(projection.weight, projection.bias)
    torch.manual_seed(0)
    for _ in range(20):
        weight = projection.weight + 1e-2 * torch.randn_like(projection.weight)
        assert cost(weight, projection.bias) > best
        bias = projection.bias + 1e-2 * torch.randn_like(projection.bias)
        assert cost(projection.weight, bias) > best
    found = hidden @ projection.weight.t() + projection.bias
    spread = (wanted - wanted.mean(dim=0)).square().sum()
    assert share == pytest.approx(1 - float((found - wanted).square().sum() / spread), abs=1e-3)


def test_grounding_spells_the_tissue_before_the_language_model_is_asked(
    tiny: Tiny, tmp_path: Path
) -> None:
    settings = {
        "grounding_steps": 60,
        "anchoring_steps": 60,
        "grounding_batch_size": 8,
        "grounding_questions": 2,
        "grounding_learning_rate": 5e-3,
        "steps": 2,
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
    assert model.details["words"] == grounding.words.ids.tolist(), "what its tokens spell with"
    spelt = {tuple(row) for row in model.details["spellings"]}
    assert spelt == {tuple(grounding.targets([answer])[0].tolist()) for answer in grounding._spelt}
    for tissue in TISSUES:
        with torch.no_grad():
            visual = model.visual_prefix(model.encode(tiny.image(tissue)), [QUESTION])
            nearest = torch.cdist(visual[0], grounding.words.embeddings).argmin(dim=1)
        assert nearest.tolist() == grounding.targets([tissue])[0].tolist()

    # A run that lost its later stages goes on from the first one's checkpoint to the same weights.
    tune(recipe, out=tmp_path / "b", run=tmp_path / "other", max_steps=1, **paths)
    for stage in ("anchor", "tune"):
        shutil.rmtree(tmp_path / "other" / "checkpoints" / stage)
    second = tune(recipe, out=tmp_path / "b", run=tmp_path / "other", **paths)
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


def check_only_training_draws(grounding: GroundingObjective) -> None:
    grounding.module.train()
    batch = grounding.collate([0, 1])
    first, second = (grounding.losses(batch).sum.item() for _ in range(2))
    assert first != second
    grounding.module.eval()
    assert grounding.losses(batch).sum.item() == grounding.losses(batch).sum.item()


def test_a_training_step_sees_a_share_of_the_tokens_and_an_answer_all(tiny: Tiny) -> None:
    still = replace(tiny, recipe=tiny_recipe(tiny.folder, qformer={"dropout": 0.0}))
    grounding = objective(still, tokens_seen=0.25)
    features = torch.arange(2 * 16 * 3, dtype=torch.float32).view(2, 16, 3)
    seen = grounding._seen(features)
    assert seen.shape == (2, 4, 3)
    for image, kept in zip(features, seen, strict=True):
        rows = {tuple(row) for row in image.tolist()}
        assert len({tuple(row) for row in kept.tolist()} & rows) == 4
    check_only_training_draws(grounding)


def test_a_training_step_sees_some_channels_and_the_others_at_their_mean(tiny: Tiny) -> None:
    still = replace(tiny, recipe=tiny_recipe(tiny.folder, qformer={"dropout": 0.0}))
    model = tiny_clover(still.recipe)
    data = load_feature_set(
        tiny.instructions,
        needs="question",
        encoder=model.encoder,
        cache=tiny.folder / "cache",
        views=2,
    )
    grounding = GroundingObjective(model, data, channels_seen=0.5)
    every = data.cache.get(list(dict.fromkeys(data.digests)))
    mean = every.mean(dim=(0, 1))
    features = data.features(range(40))
    before = torch.get_rng_state()
    torch.testing.assert_close(grounding._mean_over_images(), mean, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), before)  # a resumed run draws the same numbers
    seen = grounding._seen(features)
    assert seen.shape == features.shape
    hidden = (seen - grounding._channel_means).abs().amax(dim=1) == 0  # [40, E]
    kept = (seen == features).all(dim=1)
    assert bool((hidden | kept).all())  # whole channels, and nothing between
    share = hidden.float().mean()
    assert 0.4 < float(share) < 0.6
    assert not torch.equal(hidden[0], hidden[1])  # each image loses others
    check_only_training_draws(grounding)


@pytest.fixture
def kept(tiny: Tiny) -> TuneObjective:
    """Return the language model's steps with what was learnt before kept, twice as heavy."""
    still = replace(tiny, recipe=tiny_recipe(tiny.folder, qformer={"dropout": 0.0}))
    grounding = objective(still, anchor=0.2)
    held = KeptSpelling(grounding.fits, grounding.spelling_loss, 2.0)
    return TuneObjective(grounding.model, grounding.data, held)


def test_what_was_learnt_before_stands_beside_the_language_models_loss(
    tiny: Tiny, kept: TuneObjective
) -> None:
    before = objective(replace(tiny, recipe=kept.model.recipe), anchor=0.2)
    batch, plain = kept.collate([0, 1, 2]), TuneObjective(kept.model, kept.data)
    spelt = before.losses(before.collate([0, 1, 2]))
    found, alone = kept.losses(batch), plain.losses(batch)
    assert float(spelt.sum) > 0
    torch.testing.assert_close(found.sum, alone.sum + 2 * spelt.sum, rtol=1e-5, atol=1e-5)
    assert float(found.count) == float(alone.count)
    # An answer that cannot be spelt has the language model's loss alone.
    answers = ["colon " * 40, *batch.answers[1:]]
    odd = replace(batch, answers=answers)
    expected = plain.losses(odd).sum
    rest = before.spelling_loss(
        kept.model.visual_prefix(batch.features[1:], batch.questions[1:]), answers[1:]
    )
    torch.testing.assert_close(kept.losses(odd).sum, expected + 2 * rest, rtol=1e-5, atol=1e-5)


def test_a_batch_in_parts_keeps_the_same(kept: TuneObjective) -> None:
    whole = kept.losses(kept.collate([0, 1, 2, 3]))
    parts = [kept.losses(kept.collate(part)) for part in ([0], [1, 2, 3])]
    torch.testing.assert_close(whole.sum, parts[0].sum + parts[1].sum, rtol=1e-5, atol=1e-5)
    assert float(whole.count) == float(parts[0].count + parts[1].count)


def test_visual_tokens_stay_words_while_the_language_model_teaches(
    tiny: Tiny, tmp_path: Path
) -> None:
    """Also stopped half-way: the weights are those of one go."""
    steps = {"grounding_steps": 30, "anchoring_steps": 30, "grounding_batch_size": 16}
    paths = {"instructions": tiny.instructions, "cache": tiny.folder / "cache"}

    def trained(name: str, weight: float, *stops: int) -> Path:
        recipe = tiny_recipe(tiny.folder, tune=steps | {"grounding_kept": weight})
        for stop in (*stops, None):
            tune(recipe, out=tmp_path / name, run=tmp_path / f"{name}-run", max_steps=stop, **paths)
        return tmp_path / name

    def distance(folder: Path) -> float:
        model = clover.load(folder)
        data = load_feature_set(
            tiny.instructions, needs="question", encoder=model.encoder, cache=tiny.folder / "cache"
        )
        before = GroundingObjective(model, data, anchor=0.2)
        with torch.no_grad():
            losses = before.losses(before.collate(range(len(data.records))))
        return float(losses.sum / losses.count)

    held, again = trained("held", 5.0), trained("again", 5.0, 7)
    assert distance(held) < distance(trained("free", 0.0))
    weights = [(folder / "bridge.safetensors").read_bytes() for folder in (held, again)]
    assert weights[0] == weights[1]


def test_nothing_can_be_kept_that_was_never_learnt() -> None:
    with pytest.raises(CloverError, match=r"grounding_kept is 2\.0, but grounding_steps is 0"):
        load_recipe("phantom", ("tune.grounding_kept=2", "tune.grounding_steps=0"))
