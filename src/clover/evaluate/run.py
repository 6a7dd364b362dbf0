"""Evaluate a model: predict, score, and find out how much of the score is owed to the image.

In: a model, questions with answers. Out: prediction files and `scores.json`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clover.core.files import write_json, write_jsonl
from clover.core.record import write_rejected
from clover.evaluate.baseline import (
    colour_only_baseline,
    linear_probe_baseline,
    question_only_baseline,
)
from clover.evaluate.interval import paired_bootstrap
from clover.evaluate.item import ItemReader
from clover.evaluate.predict import PredictionJob, Row, predict
from clover.evaluate.protocol.strict import rate
from clover.evaluate.score import per_log_parameters, score
from clover.evaluate.view import CONTROLS
from clover.model import load, read_config
from clover.vision.dataset import FeatureSet, load_feature_set

PROTOCOL = "strict"
_BASELINES = {"colour": "colour_only", "question_only": "question_only", "probe": "linear_probe"}
_SCORES = ("closed", "open_recall", "open_precision", "open_f1", "open_exact")


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and which controls run beside it."""

    job: PredictionJob
    out: Path
    controls: bool = True
    control_items: int = 0
    """Questions of the shuffled and the noise control; all when 0."""
    train: FeatureSet | None = None
    """Training questions, for the colour-only baseline."""
    draws: int = 1000


def evaluate(evaluation: Evaluation) -> dict[str, Any]:
    """Predict with and without the image, score, and write `scores.json` into `out`.

    Returns:
        What `scores.json` holds: closed, open_recall (percent), image_gain_closed,
        image_gain_open (points; null without controls), num_closed, num_open, seconds, dollars,
        and details.
    """
    start = time.perf_counter()
    job, out = evaluation.job, evaluation.out
    out.mkdir(parents=True, exist_ok=True)
    write_rejected(out / "rejected.jsonl", job.data.rejected)
    rows: dict[str, list[Row]] = {"image": predict(job, out / "predictions.jsonl")}
    if evaluation.controls:
        few = _sample(len(job.data.records), evaluation.control_items, job.seed)
        for view in CONTROLS:
            # The blind view asks each question once, so that all of them cost little.
            chosen = None if view == "blind" else few
            rows[view] = predict(job, out / f"{view}.jsonl", view=view, indices=chosen)
    baselines = _baseline_rows(evaluation)
    for name, found in baselines.items():
        write_jsonl(out / f"{name}.jsonl", [{"header": {"model": name}}, *found])
    scores = _scores(evaluation, rows, baselines)
    scores["seconds"] = round(time.perf_counter() - start, 1)
    write_json(out / "scores.json", scores)
    return scores


def evaluate_folder(
    folder: Path,
    *,
    data: Path,
    out: Path,
    cache: Path,
    images: Path | None = None,
    train: Path | None = None,
    controls: bool = False,
    control_items: int = 0,
) -> dict[str, Any]:
    """Evaluate a model folder on a file of questions; see `evaluate`."""
    model = load(folder)
    config = model.recipe.evaluate
    read = partial(
        load_feature_set, needs="question", encoder=model.encoder, cache=cache, images=images
    )
    job = PredictionJob(
        model=model,
        data=read(data),
        settings=model.default_settings(),
        batch_size=config.batch_size,
        model_key=read_config(folder).get("key", ""),
        seed=model.recipe.seed,
    )
    return evaluate(
        Evaluation(
            job,
            out,
            controls=controls,
            control_items=control_items,
            train=read(train) if train is not None else None,
            draws=config.bootstrap,
        )
    )


def _sample(size: int, wanted: int, seed: int) -> list[int] | None:
    if wanted == 0 or wanted >= size:
        return None
    random = np.random.default_rng(seed)
    return sorted(random.choice(size, wanted, replace=False).tolist())


def _baseline_rows(evaluation: Evaluation) -> dict[str, list[Row]]:
    """Answer by colour alone, by the question alone, and by a linear probe of the same features.

    The probe is told the question's form and its possible answers, and learns one classifier each:
    an upper reference for what the frozen features hold, not a rival.
    """
    train, test = evaluation.train, evaluation.job.data
    if train is None:
        return {}
    return {
        "colour": colour_only_baseline(
            train.records, test.records, train_folder=train.images, test_folder=test.images
        ),
        "question_only": question_only_baseline(train.records, test.records),
        "probe": linear_probe_baseline(
            pooled(train), pooled(test), train=train.records, test=test.records, penalty=10.0
        ),
    }


def pooled(data: FeatureSet) -> NDArray[np.float32]:
    """Return mean and standard deviation over an image's tokens, [N, 2E], a row a record."""
    known: dict[str, NDArray[np.float32]] = {}
    for index, digest in enumerate(data.digests):
        if digest not in known:
            tokens = data.features([index])[0].numpy()
            known[digest] = np.concatenate([tokens.mean(axis=0), tokens.std(axis=0)])
    return np.stack([known[digest] for digest in data.digests])


def _scores(
    evaluation: Evaluation, rows: Mapping[str, list[Row]], others: Mapping[str, list[Row]]
) -> dict[str, Any]:
    views = {view: score(found, PROTOCOL, draws=evaluation.draws) for view, found in rows.items()}
    gains = {
        view: image_gain(rows["image"], rows[view], draws=evaluation.draws)
        for view in CONTROLS
        if view in rows
    }
    image, blind = views["image"], gains.get("blind")
    parameters = evaluation.job.model.bridge.num_trainable()
    baselines = {
        _BASELINES[name]: _figures(score(found, PROTOCOL, draws=evaluation.draws))
        for name, found in others.items()
    }
    return {
        "closed": image["closed"]["value"],
        "open_recall": image["open_recall"]["value"],
        "image_gain_closed": blind["closed"]["difference"] if blind else None,
        "image_gain_open": blind["open"]["difference"] if blind else None,
        "num_closed": image["closed"]["n"],
        "num_open": image["open_recall"]["n"],
        "seconds": 0.0,
        "dollars": 0.0,
        "notice": "research use only, not for diagnosis",
        "details": {
            "model": evaluation.job.model.name,
            "model_key": evaluation.job.model_key,
            "protocol": f"{PROTOCOL}@{image['details']['version']}",
            "data": evaluation.job.data.summary(),
            "images": str(evaluation.job.data.images),
            "trainable_parameters": parameters,
            "per_log_parameters": {
                name: per_log_parameters(image[name]["value"], parameters)
                for name in ("closed", "open_recall")
                # Below a million parameters the figure means nothing.
                if image[name]["value"] is not None and parameters > 1e6
            },
            "views": {view: _figures(found) for view, found in views.items()},
            "gains": {view: _gain_row(found) for view, found in gains.items()},
            "unparsed": image["details"]["unparsed"],
            "yes_rate": image["details"]["yes_rate"],
            "base_rate": image["details"]["base_rate"],
            "baselines": baselines,
            "forms": form_table(rows, others),
            "verdict": verdict(gains.get("blind"), gains.get("shuffled")),
        },
    }


def _figures(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in _SCORES}


def _gain_row(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        kind: {
            "value": item["difference"],
            "low": item["low"],
            "high": item["high"],
            "n": item["n"],
        }
        for kind, item in found.items()
    }


def ratings(rows: Sequence[Row]) -> dict[str, tuple[bool, float, str]]:
    """Rate predictions by the strict rule.

    Returns:
        id -> (is closed, closed hit or open recall as a fraction, the image it hangs on).
    """
    rated = {}
    for item in ItemReader().items(rows):
        rating = rate(item)
        value = rating.closed if item.is_closed else rating.recall
        rated[str(item.id)] = (item.is_closed, float(value or 0.0), item.image or str(item.id))
    return rated


def image_gain(
    with_image: Sequence[Row], without: Sequence[Row], *, draws: int = 1000
) -> dict[str, dict[str, Any]]:
    """Return by how many points the image helps, over the questions both were asked.

    Returns:
        closed and open: difference, low, high (95 %, clustered by image), p_value, n.
    """
    seen, unseen = ratings(with_image), ratings(without)
    gains = {}
    for kind, is_closed in (("closed", True), ("open", False)):
        ids = [name for name in unseen if name in seen and seen[name][0] == is_closed]
        gains[kind] = paired_bootstrap(
            [seen[name][1] for name in ids],
            [unseen[name][1] for name in ids],
            clusters=[seen[name][2] for name in ids],
            draws=draws,
        )
    return gains


def form_table(
    rows: Mapping[str, Sequence[Row]], others: Mapping[str, Sequence[Row]]
) -> dict[str, Any]:
    """Return accuracy (closed) or recall (open) in percent: question form by view or baseline."""
    forms = {str(row["id"]): str(row.get("form") or row["question"]) for row in rows["image"]}
    table: dict[str, dict[str, Any]] = {}
    for view, found in {**rows, **others}.items():
        values = defaultdict(list)
        for name, (is_closed, value, _) in ratings(found).items():
            key = forms[name], is_closed
            values[key].append(value)
        for (form, is_closed), numbers in sorted(values.items()):
            kind = "closed" if is_closed else "open"
            entry = table.setdefault(f"{form} ({kind})", {"type": kind})
            if view == "image":
                entry["n"] = len(numbers)
            entry[view] = round(100 * float(np.mean(numbers)), 2)
    for name, share in _majority(rows["image"], forms).items():
        if name in table:
            table[name]["majority"] = share
    return table


def _majority(rows: Sequence[Row], forms: Mapping[str, str]) -> dict[str, float]:
    """Return the share of the commonest answer of each form, in percent."""
    answers = defaultdict(list)
    for row in rows:
        is_closed = row.get("answer_type") == "closed"
        key = f"{forms[str(row['id'])]} ({'closed' if is_closed else 'open'})"
        answers[key].append(str(row["answer"]).lower())
    return {
        key: round(100 * max(map(found.count, set(found))) / len(found), 2)
        for key, found in answers.items()
    }


def verdict(blind: Mapping[str, Any] | None, shuffled: Mapping[str, Any] | None) -> str:
    """Say in a sentence whether the model looks at the image."""
    if blind is None:
        return "Not known whether the model looks: run again with --controls."
    said = []
    for kind in ("closed", "open"):
        gain = blind[kind]
        if gain["n"] == 0:
            continue
        low, high = gain["low"], gain["high"]
        bounds = "" if low is None else f" [{low:.1f}, {high:.1f}]"
        looks = low is not None and low > 0
        said.append(
            f"on {kind} questions the image {'is worth' if looks else 'shows no proven gain:'} "
            f"{gain['difference']:.1f}{bounds} points"
        )
    lows = [blind[kind]["low"] for kind in ("closed", "open") if blind[kind]["n"]]
    proven = [low is not None and low > 0 for low in lows]
    head = "The model looks" if proven and all(proven) else "The model looks only in part"
    if not any(proven):
        head = "The model does not look"
    if shuffled is not None and shuffled["closed"]["n"]:
        said.append(
            f"with another image it loses {shuffled['closed']['difference']:.1f} points (closed)"
        )
    return f"{head}: {'; '.join(said)}."
