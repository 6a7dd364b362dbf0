"""Few-shot tuning: K labelled images a class, several draws, beside what needs no bridge.

In: a tuned model folder, labelled images. Out: `shots.jsonl` (one line a fit, so that the same call
continues), `shots.json`, `shots.svg`, and a model folder taught by the most shots.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clover.core.errors import CloverError
from clover.core.files import (
    fingerprint,
    growing,
    held,
    sha256_file,
    whole_lines,
    write_json,
    write_text,
)
from clover.core.record import Record, write_records
from clover.core.run import LOCK
from clover.core.terminal import progress
from clover.model import Clover, build_bridge, load, load_bridge, read_config, recipe_of
from clover.tune.curve import chart, summarise
from clover.tune.fewshot import PENALTY, PRIOR, Candidates, Floats, Taught, opinions, teach
from clover.tune.labelled import QUESTION, draw_shots, read_labelled, split
from clover.tune.spelling import Spelling
from clover.vision.dataset import FeatureSet, load_feature_set
from clover.vision.encoder import ImageEncoder
from clover.vision.leaks import refuse_leaks
from clover.vision.probe import fit_softmax, nearest_class_mean, pooled
from clover.vision.turned import plain_encoder

OURS = "CLOVER"
JOINT = "CLOVER and probe"
PROBE = "linear probe"
MEAN = "nearest class mean"
_BATCH = 32
_PROBE_PENALTY = 0.1
"""The best of 0.01 to 10 on images that no published figure rests on: docs/evaluate-model.md."""


@dataclass(frozen=True)
class ShotJob:
    """What is learnt from how many images, and beside what.

    Attributes:
        model: The tuned model folder.
        data: A folder of class folders, or a table of image and label.
        out: Where results go.
        cache: The feature cache's folder.
        shots: Images a class, several numbers.
        seeds: How many draws of each.
        validation: Other labelled images to test on; without them half of the groups of `data`.
        images: Where a table's image paths start.
        question: What is asked.
        answers: Label -> answer; the label in words by default.
        beside: Name -> a further model folder, which reads an image as its own recipe says
            (`evaluate.turns`), or a run folder of stage 1 alone, which reads it once.
        allow_leaks: Go on where shots and test share images.
    """

    model: Path
    data: Path
    out: Path
    cache: Path
    shots: tuple[int, ...]
    seeds: int = 5
    validation: Path | None = None
    images: Path | None = None
    question: str = QUESTION
    answers: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[str, Path] = field(default_factory=dict)
    allow_leaks: bool = False


@dataclass
class _Reader:
    """One model's reading of all images: query rows, and its opinion without a shot."""

    candidates: Candidates
    pool: Floats
    test: Floats
    prior: tuple[Floats, Floats] | None


def tune_shots(job: ShotJob) -> dict[str, Any]:
    """Fit and test every number of shots, every draw, every model; write the curve.

    Returns:
        What `shots.json` holds.

    Raises:
        CloverError: data that cannot be used, too few images of a class, or leaks; or another
            process trains in `job.out`.
    """
    with held(job.out / LOCK, f"trains in {job.out}"):
        return _tune_shots(job)


def _tune_shots(job: ShotJob) -> dict[str, Any]:
    model = load(job.model)
    pool, test = _labelled(job, model)
    trial = _Trial(job, model, pool, test)
    key, path = trial.key(), job.out / "shots.jsonl"
    done = _done(path, key)
    waiting = [
        (method, *draw)
        for method in trial.methods
        for draw in trial.draws
        if (method, *draw) not in done
    ]
    with (
        growing(path),
        path.open("a", encoding="utf-8") as out,
        progress("few-shot", len(waiting)) as advance,
    ):
        for fit in waiting:
            done[fit] = trial.right(*fit)
            row = dict(zip(("method", "shots", "seed"), fit, strict=True))
            out.write(json.dumps({**row, "key": key, "right": done[fit]}) + "\n")
            out.flush()
            advance(1)
    result = summarise(
        done,
        methods=trial.methods,
        shots=job.shots,
        seeds=job.seeds,
        groups=[str(record.group) for record in test.records],
        ours=OURS,
    )
    result |= {
        "question": job.question,
        "answers": trial.names,
        "test_images": len(test.records),
        "pool_images": len(pool.records),
        "key": key,
        "notice": "research use only, not for diagnosis",
    }
    write_json(job.out / "shots.json", result)
    write_text(job.out / "shots.svg", chart(result))
    if waiting or not (job.out / "model" / "config.json").exists():
        _save(model, trial.taught(OURS, max(job.shots), 0), job.out / "model")
    return result


def _weights(path: Path) -> Path:
    """Return the weights of a model folder, or of a run folder of stage 1."""
    for name in ("bridge.safetensors", "align.safetensors"):
        if (path / name).exists():
            return path / name
    raise CloverError(f"{path} is no model folder and no run folder of clover align")


def _turns(path: Path) -> int:
    """Return how many copies of an image a further model reads, as its folder says."""
    if _weights(path).stem != "bridge":
        return 1  # stage 1
    return recipe_of(read_config(path), path).evaluate.turns


def _labelled(job: ShotJob, model: Clover) -> tuple[FeatureSet, FeatureSet]:
    """Read the labelled images and their features: a pool to draw from, and a test set."""
    job.out.mkdir(parents=True, exist_ok=True)
    read = {"question": job.question, "answers": job.answers}
    records = read_labelled(job.data, **read)  # type: ignore[arg-type]
    if job.validation is None:
        parts: list[Sequence[Record]] = list(split(records))
        sources = [job.data, job.data]
    else:
        known = {str(record.answer) for record in records}
        answers = {label: answer for label, answer in job.answers.items() if answer in known}
        parts = [records, read_labelled(job.validation, question=job.question, answers=answers)]
        sources = [job.data, job.validation]
    sets = []
    for name, part, source in zip(("pool", "test"), parts, sources, strict=True):
        if not part:
            raise CloverError(f"{source}: no image is left for the {name}; give --validation DATA")
        write_records(job.out / f"{name}.jsonl", part)
        folder = source if source.is_dir() else job.images or source.parent
        # Read once, as the probe beside it, and as it is saved.
        sets.append(_features(job, name, plain_encoder(model.encoder), folder))
    pool, test = sets
    if not job.allow_leaks:
        refuse_leaks(pool, test, cache=job.cache, what="shots and test images")
    return pool, test


def _features(job: ShotJob, name: str, encoder: ImageEncoder, images: Path) -> FeatureSet:
    """Read `pool` or `test` as `_labelled` wrote it, with an encoder's features."""
    path = job.out / f"{name}.jsonl"
    return load_feature_set(path, needs="question", encoder=encoder, cache=job.cache, images=images)


class _Trial:
    """All fits of one job: what is read of a model is read once."""

    def __init__(self, job: ShotJob, model: Clover, pool: FeatureSet, test: FeatureSet) -> None:
        self.job, self.model, self.pool, self.test = job, model, pool, test
        self.names = sorted({str(record.answer) for record in pool.records})
        strangers = {str(record.answer) for record in test.records} - set(self.names)
        if strangers:
            raise CloverError(f"the test images are also '{min(strangers)}', the shots never are")
        self.draws = {
            (count, seed): draw_shots(pool.records, count=count, seed=seed)
            for count in job.shots
            for seed in range(job.seeds)
        }
        self.methods = (OURS, JOINT, *job.beside, PROBE, MEAN)
        self.labels = self._codes(pool)
        self._truth = self._codes(test)
        self._readers: dict[str, _Reader] = {}

    def _codes(self, data: FeatureSet) -> NDArray[np.int64]:
        return np.array([self.names.index(str(record.answer)) for record in data.records])

    def key(self) -> str:
        """Return the key of everything a fit depends on."""
        records = (*self.pool.records, *self.test.records)
        weights = [_weights(path) for path in (self.job.model, *self.job.beside.values())]
        return fingerprint(
            [
                [[record.id, record.answer] for record in records],
                [self.pool.digests, self.test.digests],
                [self.job.question, PRIOR, PENALTY],
                [sha256_file(path) for path in weights],
                [[name, _turns(path)] for name, path in self.job.beside.items()],
            ]
        )

    def right(self, method: str, count: int, seed: int) -> list[int]:
        """Fit one method to one draw; return 1 or 0 for each test image."""
        chosen = self.draws[count, seed]
        labels = self.labels[chosen]
        shots, asked = self._flat
        if method in (PROBE, MEAN):
            said = _simple(method, *_levelled(shots[chosen], asked), labels)
        elif method == JOINT:
            reader = self._reader(OURS)
            rows = (part.reshape(len(part), -1) for part in (reader.pool[chosen], reader.test))
            both = zip(_levelled(*rows), _levelled(shots[chosen], asked), strict=True)
            fitted, read = (np.concatenate(part, axis=1) * np.sqrt(0.5) for part in both)
            said = _simple(PROBE, fitted, read, labels)
        else:
            said = self.taught(method, count, seed).scores.argmax(axis=1)
        return [int(hit) for hit in said == self._truth]

    def taught(self, method: str, count: int, seed: int) -> Taught:
        """Teach one model by one draw."""
        reader, chosen = self._reader(method), self.draws[count, seed]
        prior = None if reader.prior is None else (reader.prior[0][chosen], reader.prior[1])
        return teach(
            reader.pool[chosen],
            self.labels[chosen],
            reader.test,
            candidates=reader.candidates,
            prior=prior,
        )

    @cached_property
    def _flat(self) -> tuple[Floats, Floats]:
        return pooled(self.pool).astype(np.float64), pooled(self.test).astype(np.float64)

    def _as_seen_by(self, encoder: ImageEncoder) -> tuple[FeatureSet, FeatureSet]:
        """Return pool and test with the features of a further model's own encoder."""
        job = self.job
        pool, test = (
            _features(job, name, encoder, found.images)
            for name, found in (("pool", self.pool), ("test", self.test))
        )
        for found, own in ((pool, self.pool), (test, self.test)):
            # Draws and folds are places in these records.
            if [record.id for record in found.records] != [record.id for record in own.records]:
                raise CloverError(
                    f"{encoder.id} cannot read every image that the model to be taught reads "
                    f"({len(found.records):,} of {len(own.records):,}); leave it out of --beside"
                )
        return pool, test

    def _reader(self, method: str) -> _Reader:
        if method not in self._readers:
            path = self.job.model if method == OURS else self.job.beside[method]
            model = self.model if method == OURS else _beside(path, self.model)
            needed = sorted({index for draw in self.draws.values() for index in draw})
            self._readers[method] = _read(
                model,
                (self.pool, self.test) if method == OURS else self._as_seen_by(model.encoder),
                needed,
                names=self.names,
                is_taught=_weights(path).stem == "bridge",
            )
        return self._readers[method]


def _levelled(shots: Floats, asked: Floats) -> tuple[Floats, Floats]:
    """Return rows centred by the shots, and scaled so that these have a mean length of one."""
    center = shots.mean(axis=0)
    scale = float(np.sqrt(((shots - center) ** 2).sum(axis=1).mean())) or 1.0
    return (shots - center) / scale, (asked - center) / scale


def _simple(method: str, shots: Floats, asked: Floats, labels: NDArray[np.int64]) -> Any:
    """Answer by a simple classifier of levelled rows."""
    if method == MEAN:
        return np.array(nearest_class_mean(shots, list(labels.astype(str)), asked)).astype(int)
    probe = fit_softmax(shots, list(labels.astype(str)), penalty=_PROBE_PENALTY)
    return np.array(probe.predict(asked)).astype(int)


def _beside(path: Path, model: Clover) -> Clover:
    """Load a further model: tuned, or stage 1 alone under a projection that learns from shots."""
    if _weights(path).stem == "bridge":
        return load(path)
    encoder = plain_encoder(model.encoder)  # stage 1 reads an image once
    bridge = build_bridge(
        model.recipe, encoder, model.tokenizer, language_width=model.language.hidden_size
    )
    load_bridge(bridge, path / "align.safetensors", without=("heads.", "projection."))
    bridge.to(model.device.device).eval()
    return Clover(model.recipe, encoder, bridge, model.language, model.tokenizer, model.device)


@torch.no_grad()
def _read(
    model: Clover,
    data: tuple[FeatureSet, FeatureSet],
    needed: Sequence[int],
    *,
    names: Sequence[str],
    is_taught: bool,
) -> _Reader:
    """Read pool and test; rows of the pool that no draw holds stay zero."""
    mean, _ = model.language.embedding_statistics()
    candidates = _candidates(model, names, mean)
    hidden = []
    for part_of, indices in zip(data, (needed, range(len(data[1].records))), strict=True):
        rows: Any = None
        for start in range(0, len(indices), _BATCH):
            part = list(indices[start : start + _BATCH])
            questions = [model.question_of(part_of.records[index]) for index in part]
            with model.device.autocast():
                found = model.visual_hidden(part_of.features(part), questions)
            if rows is None:
                rows = np.zeros((len(part_of.records), *found.shape[1:]))
            rows[part] = found.double().cpu().numpy()
        hidden.append(rows)
    if not is_taught:
        return _Reader(candidates, hidden[0], hidden[1], None)
    projection = model.bridge.projection
    assert projection is not None, "this bridge was built without a language model"
    weight = projection.weight.double().cpu().numpy()
    bias = (projection.bias - mean.to(projection.bias)).double().cpu().numpy()
    said = [opinions(rows @ weight.T + bias, candidates) for rows in hidden]
    return _Reader(candidates, hidden[0], hidden[1], (said[0], said[1]))


def _candidates(model: Clover, names: Sequence[str], mean: torch.Tensor) -> Candidates:
    """Spell the answers as grounding does.

    Raises:
        CloverError: an answer is longer than the visual tokens are many.
    """
    places = model.bridge.config.num_queries
    config = model.recipe.tune
    spelling = Spelling.of(
        names,
        encode=model.language.text_tokens,
        num_places=places,
        filler=config.grounding_filler,
        kind=config.grounding_spelling,
    )
    long = [name for name in names if name not in spelling.ids]
    if long:
        raise CloverError(
            f"the answer '{long[0]}' is longer than {places} tokens, which is all that the model's "
            "visual tokens can spell; give a shorter one with --answers LABEL=ANSWER"
        )
    ids = [
        spelling.ids[name] + [spelling.filler_id] * (places - len(spelling.ids[name]))
        for name in names
    ]
    words = model.language.word_embeddings(torch.tensor(ids, device=mean.device).flatten())
    made = words.double().cpu().reshape(len(names), places, -1) - mean.double().cpu()
    return Candidates(made.numpy())


@torch.no_grad()
def _save(model: Clover, taught: Taught, folder: Path) -> None:
    """Write the model with the taught projection.

    Its own opinion weighs `PRIOR` in the fit: the change is divided by that, which alters no
    choice and leaves visual tokens as long as the language model knows them.
    """
    projection = model.bridge.projection
    assert projection is not None, "this bridge was built without a language model"
    projection.weight.add_(torch.from_numpy(taught.change / PRIOR).to(projection.weight))
    projection.bias.add_(torch.from_numpy(taught.shift / PRIOR).to(projection.bias))
    model.familiarity = None  # the shots are not among what it describes
    key = fingerprint([model.details.get("key"), "few-shot"])
    # Its answers may be spelt in words the model never knew: nothing pulls it to the old ones. It
    # was measured on images read once, and so it answers.
    kept = {
        name: value for name, value in model.details.items() if name not in ("words", "spellings")
    }
    model.details = {**kept, "key": key}
    reads = model.recipe.evaluate.model_copy(update={"turns": 1, "word_pull": 0.0})
    model.recipe = model.recipe.model_copy(update={"evaluate": reads})
    model.save(folder)


def _done(path: Path, key: str) -> dict[tuple[str, int, int], list[int]]:
    """Return the fits of an unfinished or finished call with the same key."""
    return {
        (row["method"], row["shots"], row["seed"]): row["right"]
        for row in whole_lines(path, json.loads)
        if row.get("key") == key
    }
