"""Evaluate a model: predict, score, and find out how much of the score is owed to the image.

In: a model, questions with answers. Out: prediction files and `scores.json`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from clover.core.config import EvaluateConfig
from clover.core.files import held, write_json, write_jsonl
from clover.core.record import Record, Rejection, write_rejected
from clover.evaluate.baseline import (
    colour_only_baseline,
    linear_probe_baseline,
    question_only_baseline,
)
from clover.evaluate.control import (
    Row,
    agreement,
    form_table,
    gain_row,
    image_gain,
    verdict,
)
from clover.evaluate.copied import TrainingAnswers
from clover.evaluate.decoding import find_decoding
from clover.evaluate.endpoint import EndpointModel
from clover.evaluate.item import ItemReader
from clover.evaluate.predict import NOTICE, LocalModel, PredictionJob, predict
from clover.evaluate.protocol import find_protocols
from clover.evaluate.score import per_log_parameters, score, score_sheet
from clover.evaluate.sheet import Sheet
from clover.evaluate.view import BASIC, View
from clover.model import Clover, load, read_config
from clover.vision.dataset import FeatureSet, load_feature_set
from clover.vision.familiar import UNFAMILIAR
from clover.vision.leaks import Pictured, refuse_leaks
from clover.vision.probe import pooled
from clover.vision.turned import num_turns, plain_encoder

__all__ = ["BASIC", "Evaluation", "evaluate", "evaluate_endpoint", "evaluate_folder"]

_LOG = logging.getLogger(__name__)
PROTOCOL = "strict"
_BASELINES = {"colour": "colour_only", "question_only": "question_only", "probe": "linear_probe"}
_SCORES = ("closed", "open_recall", "open_precision", "open_f1", "open_exact")


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and which controls run beside it."""

    job: PredictionJob
    out: Path
    summary: str
    """What the data are, and what was set aside of them."""
    images: Path
    rejected: list[Rejection] = field(default_factory=list)
    controls: tuple[View, ...] = ()
    control_items: int = 0
    """Questions of each control but the blind one; all when 0."""
    trainable: int | None = None
    """Parameters that were trained, where that is known."""
    baselines: Mapping[str, list[Row]] = field(default_factory=dict)
    """Prediction lines of what needs no model of ours."""
    training: Sequence[Record] = ()
    """Training questions, where they are known: to expose answers copied from them."""
    unfamiliar: Unfamiliar | None = None
    """Images unlike those the model learnt from, where its folder tells."""
    draws: int = 1000


@dataclass(frozen=True)
class Unfamiliar:
    """How many images are unlike those a model learnt from."""

    images: int
    of: int

    def row(self) -> dict[str, Any]:
        """Return the JSON-able form, with the sentence that is said of them."""
        said = f"{self.images:,} of {self.of:,} images are unlike those the model learnt from."
        return {"images": self.images, "of": self.of, "sentence": said}


def count_unfamiliar(model: Clover, data: FeatureSet) -> Unfamiliar | None:
    """Count them; None where the model folder does not describe its training images."""
    if model.familiarity is None:
        return None
    digests = sorted(set(data.digests))
    upright = (model.upright(data.cache.get([digest])) for digest in digests)
    shares = [model.familiarity.share_nearer(tokens) for tokens in upright]
    return Unfamiliar(sum(share >= UNFAMILIAR for share in shares), len(digests))


def evaluate(evaluation: Evaluation) -> dict[str, Any]:
    """Predict with and without the image, score, and write `scores.json` into `out`.

    Returns:
        What `scores.json` holds: closed, open_recall (percent), image_gain_closed,
        image_gain_open (points; null without controls), num_closed, num_open, seconds, dollars,
        and details.
    """
    start = time.perf_counter()
    rows = predict_views(evaluation)
    for name, found in evaluation.baselines.items():
        write_jsonl(evaluation.out / f"{name}.jsonl", [{"header": {"model": name}}, *found])
    scores = _scores(evaluation, rows)
    scores["seconds"] = round(time.perf_counter() - start, 1)
    write_json(evaluation.out / "scores.json", scores)
    return scores


def predict_views(evaluation: Evaluation) -> dict[str, list[Row]]:
    """Write `predictions.jsonl` and a file a control; return their lines by view.

    Raises:
        CloverError: another process predicts into the same folder.
    """
    job, out = evaluation.job, evaluation.out
    out.mkdir(parents=True, exist_ok=True)
    # Not the lock of training, which may go on in the same folder.
    with held(out / ".predictions.lock", f"predicts into {out}"):
        write_rejected(out / "rejected.jsonl", evaluation.rejected)
        rows = {"image": predict(job, out / "predictions.jsonl")}
        few = _control_indices(evaluation)
        for view in evaluation.controls:
            if view == "shuffled" and not _has_another_image(job.data):
                continue
            # The blind view asks each question once, so that all of them cost little.
            chosen = None if view == "blind" else few
            rows[view] = predict(job, out / f"{view}.jsonl", view=view, indices=chosen)
    return rows


def _has_another_image(data: Pictured) -> bool:
    return len(set(data.digests)) > 1


def remarks(evaluation: Evaluation) -> list[str]:
    """Return a line for each control that could not be asked as it is meant."""
    job = evaluation.job
    if "shuffled" not in evaluation.controls:
        return []
    if not _has_another_image(job.data):
        return ["Without the control with another image: all questions are about one image."]
    indices = _control_indices(evaluation)
    asked = range(len(job.data.records)) if indices is None else indices
    same = job.respondent.viewer("shuffled").num_of_own_group(asked)
    if not same:
        return []
    return [
        f"With another image: {same:,} of {len(asked):,} questions were shown one of their own "
        "group, as no other group has one; it may show the same finding."
    ]


def evaluate_folder(
    folder: Path,
    *,
    data: Path,
    out: Path,
    cache: Path,
    images: Path | None = None,
    train: Path | None = None,
    train_images: Path | None = None,
    controls: tuple[View, ...] = (),
    control_items: int = 0,
    decoding: str | None = None,
    check_leaks: bool = False,
    predict_only: bool = False,
) -> dict[str, Any] | None:
    """Evaluate a model folder on a file of questions; see `evaluate`.

    Args:
        folder: The model.
        data: Questions with answers.
        out: Where predictions and scores go.
        cache: The feature cache's folder.
        images: Where image paths of `data`, and of `train`, start.
        train: Training questions, for the baselines.
        train_images: Where image paths of `train` start, if elsewhere.
        controls: Views beside the image.
        control_items: Questions of each control but the blind one; all when 0.
        decoding: `recipe`, `paper` or `sense`; the recipe's own when absent.
        check_leaks: Refuse data that share an image or a group with `train`.
        predict_only: Write predictions, score nothing.

    Returns:
        What `scores.json` holds; None when only predicting.

    Raises:
        CloverError: a file that cannot be used, or leaks where they are checked.
    """
    model = load(folder)
    config = model.recipe.evaluate
    read = partial(load_feature_set, needs="question", cache=cache)
    asked = read(data, encoder=model.encoder, images=images)
    # Of a model that reads an image from several sides the probe is of the image as it is: its
    # training images need not be encoded once more.
    once = partial(read, encoder=plain_encoder(model.encoder))
    learnt = None if train is None else once(train, images=train_images or images)
    if learnt is not None and check_leaks:
        refuse_leaks(learnt, asked, cache=cache, what=f"{data} and --train {train}")
    names = read_config(folder)
    respondent = LocalModel(
        model=model,
        data=asked,
        decoding=find_decoding(
            decoding,
            config,
            is_encoder_decoder=model.recipe.language.kind == "encoder_decoder",
        ),
        batch_size=config.batch_size,
        model_key=names.get("key", ""),
        model_hash=names.get("bridge_sha256"),
        seed=model.recipe.seed,
    )
    evaluation = Evaluation(
        PredictionJob(respondent, asked, seed=model.recipe.seed),
        out,
        summary=asked.summary(),
        images=asked.images,
        rejected=asked.rejected,
        controls=controls,
        control_items=control_items,
        trainable=model.bridge.num_trainable(),
        baselines={}
        if learnt is None or predict_only
        else _baseline_rows(
            learnt,
            asked if num_turns(model.encoder) == 1 else once(data, images=images),
            model.encoder.microns_per_pixel,
        ),
        training=() if learnt is None else learnt.records,
        unfamiliar=None if predict_only else count_unfamiliar(model, asked),
        draws=config.bootstrap,
    )
    return _evaluated(evaluation, predict_only=predict_only)


def evaluate_endpoint(
    respondent: EndpointModel,
    *,
    out: Path,
    controls: tuple[View, ...] = (),
    control_items: int = 0,
    predict_only: bool = False,
) -> dict[str, Any] | None:
    """Evaluate a model behind an endpoint on the questions it was given; see `evaluate`."""
    data = respondent.data
    evaluation = Evaluation(
        PredictionJob(respondent, data, seed=respondent.seed),
        out,
        summary=data.summary(),
        images=data.images,
        rejected=data.rejected,
        controls=controls,
        control_items=control_items,
        draws=EvaluateConfig().bootstrap,
    )
    return _evaluated(evaluation, predict_only=predict_only)


def _evaluated(evaluation: Evaluation, *, predict_only: bool) -> dict[str, Any] | None:
    if predict_only:
        predict_views(evaluation)
        for line in remarks(evaluation):
            _LOG.warning(line)
        return None
    return evaluate(evaluation)


def _control_indices(evaluation: Evaluation) -> list[int] | None:
    """Return which questions each control but the blind one asks; None for all."""
    size, wanted = len(evaluation.job.data.records), evaluation.control_items
    if wanted == 0 or wanted >= size:
        return None
    random = np.random.default_rng(evaluation.job.seed)
    return sorted(random.choice(size, wanted, replace=False).tolist())


def _baseline_rows(
    train: FeatureSet, test: FeatureSet, microns_per_pixel: float | None
) -> dict[str, list[Row]]:
    """Answer by colour alone, by the question alone, and by a linear probe of the same features.

    The probe is told the question's form and its possible answers, and learns one classifier each:
    an upper reference for what the frozen features hold, not a rival.
    """
    return {
        "colour": colour_only_baseline(
            train.records,
            test.records,
            train_folder=train.images,
            test_folder=test.images,
            microns_per_pixel=microns_per_pixel,
        ),
        "question_only": question_only_baseline(train.records, test.records),
        "probe": linear_probe_baseline(
            pooled(train), pooled(test), train=train.records, test=test.records, penalty=10.0
        ),
    }


def _scores(evaluation: Evaluation, rows: Mapping[str, list[Row]]) -> dict[str, Any]:
    draws, others = evaluation.draws, evaluation.baselines
    views = {
        view: score(found, PROTOCOL, draws=draws) for view, found in rows.items() if view != "image"
    }
    views = {"image": _score_beside(rows["image"], evaluation.training, draws), **views}
    gains = {
        view: image_gain(rows["image"], found, draws=draws)
        for view, found in rows.items()
        if view != "image"
    }
    image, blind = views["image"], gains.get("blind")
    parameters = evaluation.trainable
    identity = evaluation.job.respondent.identity()
    return {
        "closed": image["closed"]["value"],
        "open_recall": image["open_recall"]["value"],
        "image_gain_closed": blind["closed"]["difference"] if blind else None,
        "image_gain_open": blind["open"]["difference"] if blind else None,
        "num_closed": image["closed"]["n"],
        "num_open": image["open_recall"]["n"],
        "seconds": 0.0,
        "dollars": 0.0,
        "notice": NOTICE,
        "details": {
            "model": identity["model"],
            "model_key": identity["model_key"],
            "decoding": identity["decoding"],
            "protocol": f"{PROTOCOL}@{image['details']['version']}",
            "data": evaluation.summary,
            "images": str(evaluation.images),
            "trainable_parameters": parameters,
            "per_log_parameters": {
                name: per_log_parameters(image[name]["value"], parameters)
                for name in ("closed", "open_recall")
                # Below a million parameters the figure means nothing.
                if image[name]["value"] is not None and parameters and parameters > 1e6
            },
            "views": {view: _figures(found) for view, found in views.items()},
            "gains": {
                view: {kind: gain_row(item) for kind, item in found.items()}
                for view, found in gains.items()
            },
            "stay": {view: agreement(rows["image"], rows[view], draws=draws) for view in gains},
            "unparsed": image["details"]["unparsed"],
            "yes_rate": image["details"]["yes_rate"],
            "base_rate": image["details"]["base_rate"],
            "baselines": {
                _BASELINES[name]: _figures(score(found, PROTOCOL, draws=draws))
                for name, found in others.items()
            },
            "forms": form_table(rows, others, draws=draws),
            "verdict": verdict(gains),
            "remarks": remarks(evaluation),
            "unfamiliar": evaluation.unfamiliar and evaluation.unfamiliar.row(),
            "exposed": image["details"]["exposed"],
            "known_set": image["details"]["known_set"],
        },
    }


def _score_beside(rows: list[Row], training: Sequence[Record], draws: int) -> dict[str, Any]:
    """Score by the strict rule, with an eye on answers that are copied from training."""
    known = TrainingAnswers(record.row() for record in training) if training else None
    sheet, reader = Sheet(find_protocols(PROTOCOL), known), ItemReader()
    sheet.fill(reader.items(rows))
    return score_sheet(sheet, reader, draws=draws)[PROTOCOL]


def _figures(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in _SCORES}
