"""Answers that need no model of ours: what any system must beat before it is said to look.

Each baseline learns from training records and returns prediction lines for the test records, to be
scored by the same protocols. Questions are grouped by their `form` field, or else by their text,
and each group has its own classifier over the answers that training holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clover.core.errors import CloverError
from clover.core.record import Record, image_path
from clover.vision.probe import fit_softmax, standardised

Floats = NDArray[np.float64]
Row = dict[str, Any]
_Answerer = Callable[[list[int]], list[str]]
"""Test indices in, answers out."""


def question_form(record: Record) -> str:
    """Return what groups a record with questions of its kind: `form`, or the question's text."""
    form = (record.model_extra or {}).get("form")
    return str(form) if form else " ".join((record.question or "").lower().split())


def prediction_rows(records: Sequence[Record], predictions: Sequence[str]) -> list[Row]:
    """Return prediction lines: the records with what was answered."""
    return [
        {**record.row(), "prediction": prediction}
        for record, prediction in zip(records, predictions, strict=True)
    ]


def majority_baseline(train: Sequence[Record], test: Sequence[Record]) -> list[Row]:
    """Answer every open, and every closed, question with its commonest answer in training."""
    return prediction_rows(test, _commonest_of_type(train, test))


def question_only_baseline(train: Sequence[Record], test: Sequence[Record]) -> list[Row]:
    """Answer each question with the commonest answer to the same form in training."""
    return _by_form(train, test, lambda indices, _labels: _constant(train, indices))


def colour_only_baseline(
    train: Sequence[Record],
    test: Sequence[Record],
    *,
    train_folder: Path,
    test_folder: Path | None = None,
) -> list[Row]:
    """Answer from the mean and standard deviation of red, green and blue alone.

    Args:
        train: Records with image, question and answer.
        test: Likewise.
        train_folder: Where the images of `train` lie.
        test_folder: Of `test`; the same folder when not given.

    Raises:
        CloverError: an image cannot be read.
    """
    folder = train_folder if test_folder is None else test_folder
    return linear_probe_baseline(
        colour_features(train, train_folder),
        colour_features(test, folder),
        train=train,
        test=test,
    )


def linear_probe_baseline(
    train_features: NDArray[Any],
    test_features: NDArray[Any],
    *,
    train: Sequence[Record],
    test: Sequence[Record],
    penalty: float = 1.0,
) -> list[Row]:
    """Answer by a linear classifier of each question form on given features.

    Args:
        train_features: [N, D], one row a training record.
        test_features: [M, D].
        train: N records.
        test: M records.
        penalty: Weight of half the squared weights beside the summed loss.

    Raises:
        CloverError: features and records differ in number, or features are not finite.
    """
    for name, features, records in (
        ("train", train_features, train),
        ("test", test_features, test),
    ):
        if features.ndim != 2 or len(features) != len(records):
            raise CloverError(
                f"{name} features have shape {features.shape} for {len(records)} records; "
                "one row a record is needed"
            )
        if not np.isfinite(features).all():
            raise CloverError(f"{name} features hold NaN or infinite values")
    # Train images are asked several questions; each form fits its own rows.
    fitted, asked = standardised(train_features, test_features)

    def fit(indices: list[int], labels: list[str]) -> _Answerer:
        if len(set(labels)) < 2:
            return _constant(train, indices)
        classifier = fit_softmax(fitted[indices], labels, penalty=penalty)
        return lambda places: classifier.predict(asked[places])

    return _by_form(train, test, fit)


def colour_features(records: Sequence[Record], folder: Path) -> Floats:
    """Return mean and standard deviation of red, green and blue of each record's image, [N, 6].

    Raises:
        CloverError: an image is missing or broken.
    """
    known: dict[str, Floats] = {}
    for record in records:
        if record.image not in known:
            known[record.image or ""] = _colours(image_path(record, folder))
    return np.stack([known[record.image or ""] for record in records])


def _colours(path: Path) -> Floats:
    from PIL import Image

    from clover.core.transparency import on_white

    try:
        with Image.open(path) as image:
            # Counts of each level say mean and deviation exactly, and cost a tenth of the pixels.
            picture = on_white(image).convert("RGB")
            counts = np.array(picture.histogram(), dtype=np.float64).reshape(3, 256)
    except (OSError, ValueError) as error:
        raise CloverError(f"cannot read the image {path}: {error}") from error
    shares = counts / counts.sum(axis=1, keepdims=True)
    levels = np.arange(256.0)
    mean = shares @ levels  # [3]
    spread = (shares * (levels - mean[:, None]) ** 2).sum(axis=1)
    return np.concatenate([mean, np.sqrt(spread)])


def _commonest(answers: Sequence[str]) -> str:
    # Of equally common ones the first in the alphabet, so that row order changes nothing.
    return min(Counter(answers).items(), key=lambda entry: (-entry[1], entry[0]))[0]


def _constant(train: Sequence[Record], indices: list[int]) -> _Answerer:
    answer = _commonest([train[index].answer or "" for index in indices])
    return lambda places: [answer] * len(places)


def _commonest_of_type(train: Sequence[Record], test: Sequence[Record]) -> list[str]:
    def kind(record: Record) -> str:
        if record.answer_type:
            return record.answer_type
        is_closed = (record.answer or "").strip(" .").lower() in ("yes", "no")
        return "closed" if is_closed else "open"

    answers: dict[str, list[str]] = {}
    for record in train:
        answers.setdefault(kind(record), []).append(record.answer or "")
    commonest = {name: _commonest(found) for name, found in answers.items()}
    return [commonest.get(kind(record), "") for record in test]


def _by_form(
    train: Sequence[Record],
    test: Sequence[Record],
    fit: Callable[[list[int], list[str]], _Answerer],
) -> list[Row]:
    """Fit an answerer a form, and answer; a form without training gets the commonest answer."""
    places = _places(train)
    predictions = _commonest_of_type(train, test)
    for form, asked in _places(test).items():
        if form in places:
            labels = [train[index].answer or "" for index in places[form]]
            for index, answer in zip(asked, fit(places[form], labels)(asked), strict=True):
                predictions[index] = answer
    return prediction_rows(test, predictions)


def _places(records: Sequence[Record]) -> Mapping[str, list[int]]:
    places: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        places.setdefault(question_form(record), []).append(index)
    return places
