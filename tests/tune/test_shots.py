"""Few-shot tuning: the fit against its equation, the draws, and the command as a user gives it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import clover
from clover.cli import main
from clover.core.errors import CloverError
from clover.core.record import Record
from clover.tune import shots
from clover.tune.curve import chart, curve_lines, summarise
from clover.tune.fewshot import PENALTY, Candidates, opinions, teach
from clover.tune.labelled import draw_shots, read_labelled, split
from clover.tune.shots import ShotJob, _labelled, _Trial
from clover.vision.dataset import FeatureSet
from tiny import Tiny, tiny_clover


def run(*arguments: str | Path) -> tuple[int, str, str]:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def problem() -> tuple[np.ndarray, np.ndarray, np.ndarray, Candidates]:
    random = np.random.default_rng(0)
    hidden, asked = random.normal(size=(6, 2, 5)), random.normal(size=(4, 2, 5))
    return hidden, np.array([0, 1, 2, 0, 1, 2]), asked, Candidates(random.normal(size=(3, 2, 7)))


def test_opinions_are_the_likelihood_of_the_words_among_the_candidates(
    problem: tuple[np.ndarray, np.ndarray, np.ndarray, Candidates],
) -> None:
    """Against the definition: softmax over a vocabulary at each place, product over places."""
    _, _, _, candidates = problem
    random = np.random.default_rng(1)
    visual = random.normal(size=(2, 2, 7))
    others = random.normal(size=(20, 7))  # words that no candidate holds
    found = opinions(visual, candidates)
    for row in range(2):
        log_likelihood = np.zeros(3)
        for candidate in range(3):
            for place in range(2):
                vocabulary = np.vstack([candidates.words.reshape(-1, 7), others])
                logits = vocabulary @ visual[row, place]
                own = candidates.words[candidate, place] @ visual[row, place]
                log_likelihood[candidate] += own - np.log(np.exp(logits).sum())
        shares = np.exp(log_likelihood) / np.exp(log_likelihood).sum()
        expected = np.exp(found[row]) / np.exp(found[row]).sum()
        assert expected == pytest.approx(shares)


def test_the_fit_is_where_its_loss_is_least_and_its_projection_gives_its_scores(
    problem: tuple[np.ndarray, np.ndarray, np.ndarray, Candidates],
) -> None:
    hidden, labels, asked, candidates = problem
    taught = teach(hidden, labels, asked, candidates=candidates, prior=None)
    # The projection that is saved says what the fit said, up to what all candidates share.
    visual = asked @ taught.change.T + taught.shift
    said = opinions(visual, candidates)
    assert said - said.mean(axis=1, keepdims=True) == pytest.approx(
        taught.scores - taught.scores.mean(axis=1, keepdims=True), abs=1e-6
    )
    # No other projection is better on shots and penalty: small steps in random directions.
    words = candidates.words - candidates.words.mean(axis=0)
    rows = hidden - hidden.mean(axis=0)
    products = np.einsum("nqd,cqh->nchd", rows, words)  # what a change is multiplied by
    scale = np.square(products).sum(axis=(2, 3)).mean()

    def loss(change: np.ndarray, shift: np.ndarray) -> float:
        scores = opinions(hidden @ change.T + shift, candidates)
        log_total = np.log(np.exp(scores).sum(axis=1))
        miss = (log_total - scores[np.arange(6), labels]).sum()
        return float(miss + 0.5 * PENALTY * scale * np.square(change).sum())

    least = loss(taught.change, taught.shift)
    random = np.random.default_rng(2)
    for _ in range(30):
        step = 1e-2 * random.normal(size=taught.change.shape) * np.abs(taught.change).max()
        assert loss(taught.change + step, taught.shift) > least - 1e-4


def test_without_much_to_learn_the_prior_decides(
    problem: tuple[np.ndarray, np.ndarray, np.ndarray, Candidates],
) -> None:
    hidden, labels, asked, candidates = problem
    prior = np.zeros((6, 3)), np.array([[9.0, 0, 0], [0, 9, 0], [0, 0, 9], [0, 9, 0]])
    taught = teach(hidden, labels, asked, candidates=candidates, prior=prior, penalty=1e6, keep=1.0)
    assert taught.scores.argmax(axis=1).tolist() == [0, 1, 2, 1]


def labelled(number: int, label: str, group: str) -> Record:
    return Record(id=str(number), image=f"{number}.png", answer=label, group=group)


def test_shots_come_from_different_groups_first_and_more_hold_fewer() -> None:
    pool = [labelled(i, "ab"[i % 2], f"g{i // 6}") for i in range(36)]
    for seed in range(5):
        three, six = (draw_shots(pool, count=count, seed=seed) for count in (3, 6))
        assert set(three) < set(six)
        for label in "ab":
            groups = [pool[i].group for i in six if pool[i].answer == label]
            assert len(set(groups)) == len(groups) == 6
    assert draw_shots(pool, count=3, seed=0) != draw_shots(pool, count=3, seed=1)
    with pytest.raises(CloverError, match="class 'a' has 18 images to draw from, 19 shots"):
        draw_shots(pool, count=19, seed=0)


def test_no_group_is_on_both_sides_of_a_split() -> None:
    records = [labelled(i, "ab"[i % 2], f"g{i // 4}") for i in range(40)]
    pool, test = split(records)
    assert pool and test
    assert not {r.group for r in pool} & {r.group for r in test}
    named = [
        r.model_copy(update={"split": "test" if r.group == "g0" else "train"}) for r in records
    ]
    assert {r.group for r in split(named)[1]} == {"g0"}


def test_regions_of_a_slide_without_a_group_stay_together(tmp_path: Path) -> None:
    rows = [f"s{i // 4}.svs#{i % 4},0,90,90,{'ab'[i % 2]}" for i in range(40)]
    table = tmp_path / "table.csv"
    quoted = ['"{}",{}'.format(*row.rsplit(",", 1)) for row in rows]
    table.write_text("\n".join(["image,label", *quoted]) + "\n")
    pool, test = split(read_labelled(table, question="?", answers={}))
    slides = [{str(r.image).partition("#")[0] for r in part} for part in (pool, test)]
    assert all(slides) and not slides[0] & slides[1]


def test_labels_become_answers(tmp_path: Path) -> None:
    for name in ("negative", "positive_patch"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(b"")
    found = read_labelled(tmp_path, question="Is it positive?", answers={"negative": "no"})
    assert [(r.image, r.answer, r.answer_type) for r in found] == [
        ("negative/a.png", "no", "closed"),
        ("positive_patch/a.png", "positive patch", "open"),
    ]
    with pytest.raises(CloverError, match="--answers names 'normal', the labels are negative"):
        read_labelled(tmp_path, question="?", answers={"normal": "no"})


def test_the_curve_is_the_mean_over_draws_and_differences_are_paired() -> None:
    hits = {
        ("CLOVER", 1, 0): [1, 1, 0, 1], ("CLOVER", 1, 1): [1, 0, 0, 1],
        ("probe", 1, 0): [1, 0, 0, 1], ("probe", 1, 1): [1, 0, 0, 1],
    }  # fmt: skip
    found = summarise(
        hits, methods=("CLOVER", "probe"), shots=(1,), seeds=2, groups=list("aabb"), ours="CLOVER"
    )
    assert found["curve"]["CLOVER"][0]["value"] == 62.5
    assert found["curve"]["CLOVER"][0]["seeds"] == [75.0, 50.0]
    difference = found["CLOVER minus"]["probe"][0]
    assert difference["value"] == 12.5 and difference["low"] == 0.0
    assert difference["high"] <= 50.0
    assert "+12.5 [+0.0" in "\n".join(curve_lines(found))
    drawing = chart(found)
    assert drawing.count("<polyline") == 2 and "62.5" in drawing
    assert drawing.count("spread") == 3  # two intervals, and their style


@pytest.fixture(scope="module")
def folder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and its images sorted into folders of two classes."""
    place = tmp_path_factory.mktemp("few")
    model = tiny_clover(tiny.recipe).save(place / "model")
    for tissue in ("liver", "colon"):
        (place / "data" / tissue).mkdir(parents=True)
        for image in (tiny.folder / "data" / "images").glob(f"{tissue}-*.png"):
            (place / "data" / tissue / image.name).write_bytes(image.read_bytes())
    return model, place / "data"


def test_a_curve_is_made_in_one_call_and_continued_by_the_same(
    folder: tuple[Path, Path], tmp_path: Path
) -> None:
    model, data = folder
    command = (
        *("tune", "--from", model, "--data", data, "--out", tmp_path / "few", "--shots", "1,2,4"),
        *("--seeds", "3", "--question", "which tissue is shown ?", "--allow-leaks"),
        *("--features", tmp_path / "features", "--beside", f"the same={model}"),
    )
    code, out, err = run(*command)
    assert code == 0, err
    found = json.loads((tmp_path / "few" / "shots.json").read_text())
    assert list(found["curve"]) == [
        "CLOVER",
        "CLOVER and probe",
        "the same",
        "linear probe",
        "nearest class mean",
    ]
    assert [point["shots"] for point in found["curve"]["CLOVER"]] == [1, 2, 4]
    # Colour decides, and every method sees it.
    assert found["curve"]["linear probe"][-1]["value"] > 90
    assert found["curve"]["CLOVER"][-1]["value"] > 90
    assert found["curve"]["CLOVER"] == found["curve"]["the same"]
    assert "research use only" in out
    lines = (tmp_path / "few" / "shots.jsonl").read_text().splitlines()
    assert len(lines) == 5 * 3 * 3
    # Half of it lost, and a torn line: the same call ends with the same curve.
    torn = "\n".join(lines[:10]) + "\n" + lines[10][:20]
    (tmp_path / "few" / "shots.jsonl").write_text(torn)
    assert run(*command)[0] == 0
    assert json.loads((tmp_path / "few" / "shots.json").read_text()) == found
    assert len((tmp_path / "few" / "shots.jsonl").read_text().splitlines()) == len(lines)


def test_an_image_whose_name_is_not_utf_8_is_set_aside(
    folder: tuple[Path, Path], tiny: Tiny, tmp_path: Path
) -> None:
    model, data = folder
    shutil.copytree(data, tmp_path / "data")
    odd = tmp_path / "data" / "liver" / os.fsdecode(b"Gr\xfcn.png")
    try:
        odd.write_bytes(next((data / "liver").iterdir()).read_bytes())
    except OSError:
        pytest.skip("this disk takes UTF-8 names only")
    job = ShotJob(model, tmp_path / "data", tmp_path / "out", tmp_path / "c", (1,))
    parts = _labelled(job, clover.load(model))
    found = [item for part in parts for item in part.rejected]
    assert [item.reason for item in found] == ["image name that is not UTF-8"]
    assert sum(len(part.records) for part in parts) == len(list(data.rglob("*.png")))


def test_a_further_model_reads_as_many_turns_as_its_own_recipe_says(
    tiny: Tiny, folder: tuple[Path, Path], tmp_path: Path
) -> None:
    """Against the rows that the model itself makes of each image, one by one."""
    model, data = folder
    turned = tiny.recipe.evaluate.model_copy(update={"turns": 8})
    other = tiny_clover(tiny.recipe.model_copy(update={"evaluate": turned})).save(tmp_path / "o")
    job = ShotJob(
        *(model, data, tmp_path / "few", tmp_path / "features", (2,), 1),
        question="which tissue is shown ?",
        beside={"turned": other, "once": model},
        allow_leaks=True,
    )
    job.out.mkdir()
    ours = clover.load(model)
    trial = _Trial(job, ours, *_labelled(job, ours))
    own = clover.load(other)
    rows = {name: trial._reader(name).test for name in ("turned", "once", "CLOVER")}
    for row, record in enumerate(trial.test.records):
        features = own.encode(data / str(record.image))
        assert features.shape[1] == 8 * ours.encoder.num_tokens
        with torch.no_grad():
            expected = own.visual_hidden(features, [own.question_of(record)])[0].double().numpy()
        assert rows["turned"][row] == pytest.approx(expected, abs=2e-3)
        assert np.abs(rows["once"][row] - expected).max() > 2e-2
    assert np.array_equal(rows["once"], rows["CLOVER"])


def test_a_further_model_that_cannot_read_an_image_is_named(
    folder: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = folder
    job = ShotJob(
        *(model, data, tmp_path / "few", tmp_path / "features", (2,), 1),
        question="which tissue is shown ?",
        beside={"other": model},
        allow_leaks=True,
    )
    job.out.mkdir()
    ours = clover.load(model)
    trial = _Trial(job, ours, *_labelled(job, ours))
    whole = shots._features

    def one_less(*given: Any) -> FeatureSet:
        return whole(*given).evenly(len(trial.pool.records) - 1)

    monkeypatch.setattr(shots, "_features", one_less)
    with pytest.raises(CloverError, match=r"cannot read every image .* leave it out of --beside"):
        trial._reader("other")


def test_fits_of_a_further_model_that_read_otherwise_are_made_again(
    folder: tuple[Path, Path], tmp_path: Path
) -> None:
    model, data = folder
    other = shutil.copytree(model, tmp_path / "other")
    command = (
        *("tune", "--from", model, "--data", data, "--out", tmp_path / "few", "--shots", "1"),
        *("--seeds", "1", "--allow-leaks", "--beside", f"other={other}"),
        *("--features", tmp_path / "features"),
    )
    assert run(*command)[0] == 0
    before = (tmp_path / "few" / "shots.jsonl").read_text()
    config = json.loads((other / "config.json").read_text())
    config["recipe"]["evaluate"]["turns"] = 8
    (other / "config.json").write_text(json.dumps(config))
    assert run(*command)[0] == 0
    after = (tmp_path / "few" / "shots.jsonl").read_text()
    assert after.startswith(before) and after.count("\n") == 2 * before.count("\n")
    assert run(*command)[0] == 0
    assert (tmp_path / "few" / "shots.jsonl").read_text() == after


def test_the_taught_model_is_a_model_folder(folder: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = folder
    run(
        *("tune", "--from", model, "--data", data, "--out", tmp_path, "--shots", "2"),
        *("--seeds", "1", "--allow-leaks", "--features", tmp_path / "features"),
        *("--question", "which tissue is shown ?"),
    )
    answer = clover.load(tmp_path / "model").ask(next(data.rglob("*.png")), "which tissue ?")
    assert answer.notice.startswith("Research use only")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--shots", "two"), "--shots 'two' is not a list of numbers such as 1,2,4"),
        (("--shots", "99"), "99 shots were asked for"),
        (("--shots", "1", "--beside", "x"), "--beside 'x' is not of the form NAME=VALUE"),
        (("--shots", "1", "--answers", "lung=yes"), "--answers names 'lung', the labels are"),
        ((), "Missing option '--recipe'"),
    ],
)
def test_mistakes_are_named_in_a_line(
    folder: tuple[Path, Path], tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    model, data = folder
    code, _, err = run(
        *("tune", "--from", model, "--data", data, "--out", tmp_path / "few", "--allow-leaks"),
        *("--features", tmp_path / "features", *arguments),
    )
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1


def test_training_refuses_images_that_will_be_evaluated(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(tiny.recipe.to_yaml())
    shared = ("--recipe", recipe, "--features", tmp_path / "features")
    code, _, err = run(
        *("tune", *shared, "--data", tiny.instructions, "--validation", tiny.instructions),
        *("--out", tmp_path / "model"),
    )
    assert code == 2 and "share 24 evaluation images" in err and "same bytes" in err
    assert not (tmp_path / "model").exists()
    code, _, err = run(
        *("align", *shared, "--data", tiny.captions, "--validation", tiny.captions),
        *("--out", tmp_path / "run"),
    )
    assert code == 2 and "share 24 evaluation images" in err
    code, _, err = run(
        *("tune", *shared, "--data", tiny.instructions, "--validation", tiny.instructions),
        *("--out", tmp_path / "model", "--allow-leaks", "--max-steps", "1"),
    )
    assert code == 0, err
