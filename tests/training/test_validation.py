"""Held-out scores while training: nothing moves by them, and the best weights are kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import clover
from clover.align.run import align
from clover.cli import cli
from clover.core.config import load_recipe
from clover.core.errors import CloverError
from clover.core.files import read_json
from clover.core.run import RunFolder
from clover.training.loop import train
from clover.training.validation import BestWeights, Kept, Validation, say_kept, settle
from clover.tune.run import tune
from clover.tune.validate import AnswerLoss, other_images
from clover.vision.dataset import FeatureSet, load_feature_set
from line import Line, job_of
from tiny import Tiny, tiny_clover, tiny_recipe

STAGES = ("align", "tune")


@pytest.fixture(scope="module")
def held_out(tiny: Tiny) -> dict[str, Path]:
    """Return held-out files; a question of theirs has a word that training never asks with."""
    folder = tiny.folder / "data"
    captions = tiny.captions.read_text().splitlines()[:10]
    questions = [json.loads(line) for line in tiny.instructions.read_text().splitlines()[:12]]
    for row in questions:
        row["question"] = row["question"].replace("tissue", "stained tissue")
    files = {"align": folder / "held-captions.jsonl", "tune": folder / "held-vqa.jsonl"}
    files["align"].write_text("\n".join(captions))
    files["tune"].write_text("\n".join(map(json.dumps, questions)))
    return files


def run_stage(
    stage: str, tiny: Tiny, out: Path, held_out: dict[str, Path], *, stop: int | None = None,
    **settings: Any,
) -> Path:  # fmt: skip
    values = {"steps": 12, "batch_size": 4, "checkpoint_every": 5, **settings}
    recipe = tiny_recipe(tiny.folder, **{stage: values})
    more: dict[str, Any] = {"cache": tiny.folder / "cache", "max_steps": stop}
    more["validation"] = held_out[stage] if values.get("validate_every") else None
    if stage == "align":
        align(recipe, captions=tiny.captions, out=out, **more)
        return out / "align.safetensors"
    tune(recipe, instructions=tiny.instructions, out=out / "model", run=out, **more)
    return out / "model" / "bridge.safetensors"


@pytest.mark.parametrize("stage", STAGES)
def test_weights_are_the_same_with_and_without_validation(
    stage: str, tiny: Tiny, tmp_path: Path, held_out: dict[str, Path]
) -> None:
    # Dropout is on: a random number drawn by validation would change every later step.
    without = run_stage(stage, tiny, tmp_path / "without", held_out)
    with_it = run_stage(stage, tiny, tmp_path / "with", held_out, validate_every=3)
    assert with_it.read_bytes() == without.read_bytes()
    rows = RunFolder(tmp_path / "with").metrics(f"{stage}-validation")
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    figure = {"align": "mean_recall", "tune": "answer_loss"}[stage]
    assert len({row[figure] for row in rows}) > 1
    assert not RunFolder(tmp_path / "without").metrics(f"{stage}-validation")


@pytest.mark.parametrize("stage", STAGES)
def test_validation_may_begin_in_the_middle_and_an_odd_step_ends_with_one(
    stage: str, tiny: Tiny, tmp_path: Path, held_out: dict[str, Path]
) -> None:
    whole = run_stage(stage, tiny, tmp_path / "whole", held_out)
    run_stage(stage, tiny, tmp_path / "parts", held_out, stop=6)
    # Settings that change no number of the training are no reason to refuse its checkpoint.
    parts = run_stage(
        stage, tiny, tmp_path / "parts", held_out, validate_every=5, validate_samples=4
    )
    assert parts.read_bytes() == whole.read_bytes()
    rows = RunFolder(tmp_path / "parts").metrics(f"{stage}-validation")
    assert [row["step"] for row in rows] == [10, 12]


@pytest.mark.parametrize("every", [0, 6])
def test_held_out_pairs_of_stage_1_are_opened_once(
    tiny: Tiny, tmp_path: Path, held_out: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
    every: int,
) -> None:  # fmt: skip
    opened: list[Path] = []

    def opens(path: Path, **more: Any) -> FeatureSet:
        opened.append(path)
        return load_feature_set(path, **more)

    monkeypatch.setattr("clover.align.run.load_feature_set", opens)
    settings = {"steps": 6, "batch_size": 4, "validate_every": every}
    align(
        tiny_recipe(tiny.folder, align=settings),
        captions=tiny.captions,
        out=tmp_path,
        cache=tiny.folder / "cache",
        validation=held_out["align"],
    )
    assert opened == [held_out["align"]]
    assert read_json(tmp_path / "align.scores.json")["num_pairs"] == 10


def test_the_last_validation_of_stage_1_is_the_score_at_the_end(
    tiny: Tiny, tmp_path: Path, held_out: dict[str, Path]
) -> None:
    run_stage("align", tiny, tmp_path, held_out, validate_every=6)
    row = RunFolder(tmp_path).metrics("align-validation")[-1]
    final = read_json(tmp_path / "align.scores.json")
    assert {name: row[name] for name in final} == final and final["num_pairs"] == 10
    recalls = [value for name, value in final.items() if "recall" in name]
    assert len(recalls) == 4 and row["mean_recall"] == pytest.approx(sum(recalls) / 4, abs=1e-3)


def test_the_answer_loss_is_that_of_single_questions_and_another_image_is_another(
    tiny: Tiny, held_out: dict[str, Path]
) -> None:
    model = tiny_clover(tiny.recipe)
    data = load_feature_set(
        held_out["tune"], needs="question", encoder=model.encoder, cache=tiny.folder / "cache"
    )
    found = AnswerLoss(model, data, 5)()
    right = wrong = tokens = 0.0
    with torch.no_grad():
        for row, record in enumerate(data.records):
            asked = [model.question_of(record)], [record.answer or ""]
            loss, count = model.loss(data.features([row]), *asked)
            # Two questions an image: the next image's are two or one further.
            other = next(
                (row + step) % 12
                for step in (1, 2)
                if data.digests[(row + step) % 12] != data.digests[row]
            )
            instead, _ = model.loss(data.features([other]), *asked)
            right, wrong, tokens = right + float(loss), wrong + float(instead), tokens + int(count)
    assert found["answer_loss"] == pytest.approx(right / tokens, abs=2e-5)
    assert found["answer_loss_other_image"] == pytest.approx(wrong / tokens, abs=2e-5)
    assert found["image_gain"] == pytest.approx((wrong - right) / tokens, abs=3e-5)


def test_samples_are_taken_evenly_from_the_file(tiny: Tiny) -> None:
    data = load_feature_set(
        tiny.instructions,
        needs="question",
        encoder=tiny_clover(tiny.recipe).encoder,
        cache=tiny.folder / "cache",
    )
    # Two questions an image: the first five would be about three images. Rows 0, 9, 19, 28, 38.
    chosen = data.evenly(5)
    assert [record.id for record in chosen.records] == ["o0", "y4", "y9", "o14", "o19"]
    assert len(set(chosen.digests)) == 5
    for number in (48, 500):
        assert [record.id for record in data.evenly(number).records] == [r.id for r in data.records]


@pytest.mark.parametrize(
    ("digests", "wanted"),
    [
        ("aabbc", [2, 2, 4, 4, 0]),
        ("abca", [1, 2, 3, 1]),  # the last a goes round, past the first
        ("aa", [1, 0]),  # no other image there is
        ("a", [0]),
    ],
)
def test_the_other_image_is_the_next_that_differs(digests: str, wanted: list[int]) -> None:
    found = other_images(list(digests))
    if len(set(digests)) > 1:
        assert found == wanted
        assert all(digests[place] != digests[row] for row, place in enumerate(found))
    else:
        assert all(0 <= place < len(digests) for place in found)


def validation(values: list[float], *, is_larger_better: bool = True) -> Validation:
    left = iter(values)
    return Validation(2, lambda: {"figure": next(left)}, "figure", is_larger_better, "held-out")


@pytest.mark.parametrize(
    ("values", "is_larger_better", "best"),
    [([1, 3, 3, 2], True, 4), ([1, 3, 3, 2], False, 2), ([5, 4, 3, 1], False, 8)],
)
def test_the_best_figure_decides_and_the_earlier_of_two_equals(
    values: list[float], is_larger_better: bool, best: int, tmp_path: Path
) -> None:
    objective = Line([1.0] * 8)
    weights = {}

    class Watching(Validation):
        def measure(self, module: torch.nn.Module) -> dict[str, float]:
            weights[len(weights) * 2 + 2] = objective.module.weight.item()
            return super().measure(module)

    plain = validation(values, is_larger_better=is_larger_better)
    watching = Watching(**vars(plain))
    train(objective, job_of(tmp_path, steps=8, learning_rate=0.1), watching)
    kept = BestWeights(tmp_path / "checkpoints" / "line", plain)
    assert kept.step == best and kept.value == values[best // 2 - 1]
    kept.load_into(objective.module)
    assert objective.module.weight.item() == weights[best] and len(set(weights.values())) == 4


def test_the_best_of_other_held_out_data_is_no_match(tmp_path: Path) -> None:
    train(Line([1.0] * 8), job_of(tmp_path, steps=2), validation([9.0]))
    folder = tmp_path / "checkpoints" / "line"
    assert BestWeights(folder, validation([])).step == 2
    other = Validation(2, dict, "figure", True, "other data")
    assert BestWeights(folder, other).value is None
    (folder / "best.pt").write_bytes(b"torn")
    assert BestWeights(folder, validation([])).value is None


@pytest.mark.parametrize("stage", STAGES)
def test_best_and_last_are_both_left_and_the_product_says_which_it_holds(
    stage: str, tiny: Tiny, tmp_path: Path, held_out: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    figures = {"align": "mean_recall", "tune": "answer_loss"}
    measure = Validation.measure
    steps = iter([4, 8, 12] * 2)

    def fourth_is_best(self: Validation, module: torch.nn.Module) -> dict[str, float]:
        # The real scores, and then a figure that is best at step 4.
        value = abs(next(steps) - 4) * (-1.0 if self.is_larger_better else 1.0)
        return {**measure(self, module), figures[stage]: value}

    monkeypatch.setattr(Validation, "measure", fourth_is_best)
    last = run_stage(stage, tiny, tmp_path / "last", held_out, validate_every=4)
    best = run_stage(
        stage, tiny, tmp_path / "best", held_out, validate_every=4, keep_weights="best"
    )
    if stage == "align":
        beside = tmp_path / "last" / "align.best.safetensors"
        other = tmp_path / "best" / "align.last.safetensors"
        notes = [read_json(path.parent / "align.json")["weights"] for path in (last, best)]
    else:
        beside = tmp_path / "last" / "tune-best" / "bridge.safetensors"
        other = tmp_path / "best" / "tune-last" / "bridge.safetensors"
        notes = [read_json(path.parent / "config.json")["weights"] for path in (last, best)]
        # A model folder like any other: it answers.
        assert clover.load(beside.parent).ask(tiny.image(), "which tissue is shown ?").model
    assert [note["kept"] for note in notes] == ["last", "best"]
    assert {note["best_step"] for note in notes} == {4}
    assert {note["last_step"] for note in notes} == {12}
    products, others = (
        [load_file(str(path)) for path in pair] for pair in ((last, best), (other, beside))
    )
    for product, same in zip(products, others, strict=True):
        assert product.keys() == same.keys()
        assert all(torch.equal(item, same[name]) for name, item in product.items())
    assert any(not torch.equal(item, products[1][name]) for name, item in products[0].items())
    # The weights after four steps, as a run of four steps with this schedule leaves them.
    run_stage(stage, tiny, tmp_path / "four", held_out, stop=4)
    state = torch.load(
        tmp_path / "four" / "checkpoints" / stage / "step-00000004.pt", weights_only=True
    )["module"]
    same = {
        name
        for name, item in products[1].items()
        if name in state and item.shape == state[name].shape
    }
    assert len(same) >= len(state) - 1
    assert all(torch.equal(products[1][name], state[name]) for name in same)
    assert not list((tmp_path / "last").glob("checkpoints/*/*"))


def test_a_killed_run_keeps_the_best_of_before(tmp_path: Path) -> None:
    def once(values: list[float], stop: int | None) -> None:
        job = job_of(tmp_path, steps=8, checkpoint_every=2)
        train(Line([1.0] * 8), replace(job, max_steps=stop), validation(values))

    once([1.0, 7.0], 4)
    once([3.0, 5.0], None)
    kept = BestWeights(tmp_path / "checkpoints" / "line", validation([]))
    assert (kept.step, kept.value) == (4, 7.0)


def test_no_held_out_file_and_best_without_validation_are_one_line(
    tiny: Tiny, tmp_path: Path
) -> None:
    for stage in STAGES:
        with pytest.raises(CloverError, match=rf"{stage}\.validate_every is 3, but there are no"):
            run_stage(stage, tiny, tmp_path, {stage: None}, validate_every=3)  # type: ignore[dict-item]
        nothing = tmp_path / "nothing.jsonl"
        with pytest.raises(CloverError, match=r"no file .*nothing\.jsonl"):
            run_stage(stage, tiny, tmp_path, {stage: nothing}, validate_every=3)
    with pytest.raises(CloverError, match="keep_weights is best, but validate_every is 0"):
        load_recipe("phantom", ("align.keep_weights=best",))


def test_what_only_measures_changes_no_key_unless_it_decides() -> None:
    plain = load_recipe("phantom")
    measured = load_recipe("phantom", ("align.validate_every=5", "align.checkpoint_keep=9"))
    assert measured.fingerprint("align") == plain.fingerprint("align")
    best = [
        load_recipe("phantom", (f"align.validate_every={n}", "align.keep_weights=best"))
        for n in (5, 6)
    ]
    assert len({item.fingerprint("align") for item in (plain, *best)}) == 3


def test_the_command_says_what_the_folder_holds(
    tiny: Tiny, tmp_path: Path, held_out: dict[str, Path]
) -> None:
    recipe = tiny_recipe(tiny.folder, align={"steps": 4}, tune={"steps": 4})
    (tmp_path / "tiny.yaml").write_text(recipe.to_yaml())
    common = ["--recipe", str(tmp_path / "tiny.yaml"), "--features", str(tiny.folder / "cache")]
    common += ["--allow-leaks"]
    run, model = tmp_path / "run", tmp_path / "model"
    calls = [
        ["align", "--data", str(tiny.captions), "--out", str(run)],
        ["tune", "--data", str(tiny.instructions), "--from", str(run), "--out", str(model)],
    ]
    for call in calls:
        stage = call[0]
        call += [*common, "--validation", str(held_out[stage])]
        call += ["--set", f"{stage}.validate_every=2"]
        for _ in range(2):  # a finished stage says it too
            done = CliRunner().invoke(cli, call, catch_exceptions=False)
            assert done.exit_code == 0
            held = [line for line in done.output.splitlines() if " holds the last " in line]
            assert len(held) == 1, done.output


@pytest.mark.parametrize("keep", ["last", "best"])
def test_what_was_done_before_it_was_validated_has_no_best_weights(
    keep: Kept, tmp_path: Path
) -> None:
    objective = Line([1.0] * 8)
    train(objective, job_of(tmp_path, steps=2))
    best = BestWeights(tmp_path / "checkpoints" / "line", validation([]))
    note = settle(
        objective.module, best, steps=2, keep=keep, save_other=lambda *_: pytest.fail("no other")
    )
    assert note["kept"] == "last" and note["best_value"] is None
    assert say_kept(note, Path("model"), Path("other")) == (
        "model holds the last weights; none were validated"
    )
