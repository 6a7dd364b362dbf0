"""Answers that need no image, exposed by name: a blind model, a yes-sayer, a copier from train.

In: the columns of judged items. Out: what is charged, each with its figures and a sentence, and
what could not be tried.

Each charge is made where a model that looks would have done otherwise. A yes-sayer is charged with
the questions whose truth is no; a copier with the questions whose training answer is wrong; a blind
model with being right no more often than its own answers are when they are dealt out again at
random among the images of the same question.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clover.evaluate.copied import LONG, LOOKUPS
from clover.evaluate.judge import Columns

Codes = NDArray[np.int64]

FEWEST = 20
"""Items that a charge must rest on."""
_ALWAYS = 0.95
_COPIED = 0.8
_NO_GAIN = 5.0
"""Points over chance below which a model is not told from a blind one (upper 95 % bound)."""
_LEAST_ROOM = 20.0
"""Points that seeing can gain; where nearly all images have one answer a blind one is right too."""


class Witness:
    """What a sheet's columns say against the model."""

    def __init__(self, columns: Columns, *, has_training: bool) -> None:
        self._columns = columns
        self._evidence = columns.evidence
        self._has_training = has_training

    def findings(self) -> dict[str, Any]:
        """Return `charges` (name, sentence, figures), `looks`, and `not_tried`."""
        columns = self._columns
        codes = columns.questions, columns.said, columns.true
        looks = chance_gain(*map(_numbers, codes))
        charges = [
            charge
            for charge in (self._yes_sayer("yes"), self._yes_sayer("no"), _blind(looks))
            if charge is not None
        ]
        charges += self._copier()
        return {"charges": charges, "looks": looks, "not_tried": list(self._not_tried(looks))}

    def num_others(self, other: Witness, ours: Sequence[int], theirs: Sequence[int]) -> int:
        """Return how many paired items differ in question and truth; a prompt may differ alone."""
        mine, also = self._columns, other._columns
        asks_else = _numbers(mine.questions)[ours] != _numbers(also.questions)[theirs]
        has_other_truth = _numbers(mine.true)[ours] != _numbers(also.true)[theirs]
        return int((asks_else & has_other_truth).sum())

    def _yes_sayer(self, word: str) -> dict[str, Any] | None:
        other = "no" if word == "yes" else "yes"
        against, for_it = self._of_truth(other), self._of_truth(word)
        said, rightly = (self._evidence["said", gold, word] for gold in (other, word))
        if against < FEWEST or said < _ALWAYS * against or rightly < 0.5 * for_it:
            return None
        share = 100 * said / against
        return {
            "name": f"{word}-sayer",
            "sentence": f"{word}-sayer: says {word} to {share:.1f}% of the {against:,} closed "
            f"questions whose truth is {other}",
            "share": share,
            "n": against,
        }

    def _copier(self) -> list[dict[str, Any]]:
        found = []
        for name in LOOKUPS:
            wrong, copied = self._evidence["wrong", name], self._evidence["copied", name]
            if wrong >= FEWEST and copied >= _COPIED * wrong:
                share = 100 * copied / wrong
                found.append(
                    {
                        "name": "copier",
                        "sentence": f"copier from train: gives the {name} training answer to the "
                        f"same question in {share:.1f}% of the {wrong:,} cases where that is wrong",
                        "share": share,
                        "n": wrong,
                        "lookup": name,
                    }
                )
        if found:
            return [max(found, key=lambda charge: (charge["share"], charge["n"]))]
        wrong, copied = self._evidence["long", "wrong"], self._evidence["long", "copied"]
        # Where the truths stand in train as well, answers follow a pattern and prove nothing.
        is_patterned = (
            self._evidence["long", "known truths"] > 0.2 * self._evidence["long", "truths"]
        )
        if wrong >= FEWEST and copied >= _COPIED * wrong and not is_patterned:
            share = 100 * copied / wrong
            return [
                {
                    "name": "copier",
                    "sentence": f"copier from train: {share:.1f}% of its {wrong:,} wrong answers "
                    f"of {LONG} words or more are training answers word for word",
                    "share": share,
                    "n": wrong,
                    "lookup": "verbatim",
                }
            ]
        return []

    def _not_tried(self, looks: Mapping[str, Any]) -> Iterable[str]:
        if min(self._of_truth("yes"), self._of_truth("no")) < FEWEST:
            yield f"yes-sayer (fewer than {FEWEST} closed questions of either truth)"
        if not _can_tell(looks):
            yield "blind (too few questions are asked of several images with different answers)"
        tried = [*(("wrong", name) for name in LOOKUPS), ("long", "wrong")]
        if not self._has_training:
            yield "copier (no --train)"
        elif max(self._evidence[kind] for kind in tried) < FEWEST:
            yield f"copier (train answers fewer than {FEWEST} of these questions wrongly)"

    def _of_truth(self, word: str) -> int:
        return sum(self._evidence["said", word, label] for label in ("yes", "no", None))


def _numbers(codes: bytearray) -> Codes:
    return np.frombuffer(codes, dtype="<i8")


def _can_tell(looks: Mapping[str, Any]) -> bool:
    return bool(looks["n"] >= FEWEST and looks["room"] >= _LEAST_ROOM)


def _blind(looks: Mapping[str, Any]) -> dict[str, Any] | None:
    if not _can_tell(looks) or looks["low"] > 0 or looks["high"] >= _NO_GAIN:
        return None
    return {
        "name": "blind",
        "sentence": f"blind: right in {looks['right']:.1f}% of {looks['n']:,} questions that are "
        f"asked of several images, and in {looks['chance']:.1f}% when its answers are dealt out "
        "at random among those images",
        "gain": looks["gain"],
        "high": looks["high"],
        "n": looks["n"],
    }


def chance_gain(questions: Codes, said: Codes, true: Codes) -> dict[str, Any]:
    """Compare hits with those of the same answers dealt out at random within each question.

    Args:
        questions: [N] codes of the question's text.
        said: [N] codes of the normalised predictions.
        true: [N] codes of the normalised truths, as `said`.

    Returns:
        right, chance, gain, low, high (percent and points; 95 % by the permutations' exact
        variance), and room, the gain of perfect answers, over the n items whose question has
        different truths; None where n is 0.

    Source: own; mean and variance of a random matching's hits from its row and column sums.
    """
    unknown = dict.fromkeys(("right", "chance", "gain", "low", "high", "room"))
    nothing: dict[str, Any] = {"n": 0, **unknown}
    if not len(questions):
        return nothing
    _, question = np.unique(questions, return_inverse=True)
    _, answer = np.unique(np.concatenate([said, true]), return_inverse=True)
    said, true = answer[: len(said)], answer[len(said) :]
    width = int(answer.max()) + 1
    size = np.bincount(question)
    num_questions = len(size)
    gold_keys, gold_counts = np.unique(question * width + true, return_counts=True)
    varies = np.bincount(gold_keys // width, minlength=num_questions) > 1
    said_keys, said_counts = np.unique(question * width + said, return_counts=True)
    _, left, right = np.intersect1d(gold_keys, said_keys, assume_unique=True, return_indices=True)
    gold, predicted = gold_counts[left].astype(float), said_counts[right].astype(float)
    of = gold_keys[left] // width

    def summed(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(of, weights=values, minlength=num_questions).astype(np.float64)

    both = summed(gold * predicted)
    spread = both - (summed(gold**2 * predicted) + summed(gold * predicted**2)) / size
    variance = (spread + both**2 / size**2) / np.maximum(size - 1, 1)
    hits = np.bincount(question, weights=said == true, minlength=num_questions)
    n = int(size[varies].sum())
    if not n:
        return nothing
    found, chance = float(hits[varies].sum()), float((both / size)[varies].sum())
    half = 1.96 * float(np.sqrt(max(variance[varies].sum(), 0.0)))
    gain = found - chance
    squares = np.bincount(gold_keys // width, gold_counts.astype(float) ** 2, num_questions)
    room = n - float((squares / size)[varies].sum())
    return {
        "n": n,
        "right": 100 * found / n,
        "chance": 100 * chance / n,
        "gain": 100 * gain / n,
        "low": 100 * (gain - half) / n,
        "high": 100 * (gain + half) / n,
        "room": 100 * room / n,
    }
