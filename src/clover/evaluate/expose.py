"""Answers that need no image, exposed by name: a blind model, a yes-sayer, a copier from train.

In: items one at a time, as `Sheet` rates them; for the copier, training questions with answers.
Out: what is charged, each with its figures and a sentence, and what could not be tried.

Each charge is made where a model that looks would have done otherwise. A yes-sayer is charged with
the questions whose truth is no; a copier with the questions whose training answer is wrong; a blind
model with being right no more often than its own answers are when they are dealt out again at
random among the images of the same question.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clover.evaluate.item import field, text_of
from clover.evaluate.protocol import Item
from clover.evaluate.protocol.normalise import first_yes_no
from clover.evaluate.protocol.strict import strict_form

Codes = NDArray[np.int64]

FEWEST = 20
"""Items that a charge must rest on."""
_ALWAYS = 0.95
_COPIED = 0.8
_NO_GAIN = 5.0
"""Points over chance below which a model is not told from a blind one (upper 95 % bound)."""
_LEAST_ROOM = 20.0
"""Points that seeing can gain; where nearly all images have one answer a blind one is right too."""
_LONG = 4
"""Words of a training answer that nobody gives by chance."""
_LONGEST_FORM = 200


def question_form(question: str) -> str:
    """Return a question's words, by which two questions are the same or not."""
    return " ".join(question.lower().split())


def answer_form(text: str) -> str:
    """Return an answer's normal form; of an essay only the lower-case text, which is cheaper."""
    return strict_form(text) if len(text) <= _LONGEST_FORM else question_form(text)


class TrainingAnswers:
    """What the training questions were answered, by the question's words."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        answers: dict[str, list[str]] = defaultdict(list)
        self.long_answers: set[str] = set()
        for row in rows:
            question, answer = text_of(field(row, "question")), text_of(field(row, "answer"))
            if not question or not answer:
                continue
            form = answer_form(answer)
            answers[question_form(question)].append(form)
            if form.count(" ") + 1 >= _LONG:
                self.long_answers.add(form)
        self._of_question = {
            question: (Counter(given).most_common(1)[0][0], given[0], given[-1])
            for question, given in answers.items()
        }

    def __len__(self) -> int:
        return len(self._of_question)

    def lookups(self, question: str) -> tuple[str, str, str] | None:
        """Return the commonest, the first and the last answer to a question, or None."""
        return self._of_question.get(question_form(question))


LOOKUPS = ("commonest", "first", "last")


class Witness:
    """Remembers of each item what the charges need: some 30 bytes."""

    def __init__(self, training: TrainingAnswers | None = None) -> None:
        self._training = training
        self._questions = bytearray()
        self._said = bytearray()
        self._true = bytearray()
        self._saying: Counter[tuple[str, str | None]] = Counter()
        self._copied: Counter[str] = Counter()
        self._num_known = 0
        self._num_wrong_lookups: Counter[str] = Counter()
        self._long: Counter[str] = Counter()

    def add(self, item: Item, question: str, gold: str | None) -> None:
        """Remember one item.

        Args:
            item: Prediction and truth.
            question: The question's form.
            gold: The yes or no that is right, for a closed item.
        """
        label = first_yes_no(item.prediction) if item.is_closed else None
        said = label or answer_form(item.prediction)
        true = gold or answer_form(item.answer)
        self._questions += _code(question)
        self._said += _code(said)
        self._true += _code(true)
        if gold is not None:
            self._saying[gold, label] += 1
        if self._training is not None:
            self._compare(item, said, true, self._training)

    def _compare(self, item: Item, said: str, true: str, training: TrainingAnswers) -> None:
        found = training.lookups(item.question)
        if found is not None:
            self._num_known += 1
            for name, answer in zip(LOOKUPS, found, strict=True):
                answer = first_yes_no(answer) or answer if item.is_closed else answer
                if answer != true:
                    self._num_wrong_lookups[name] += 1
                    self._copied[name] += said == answer
        if not item.is_closed and said != true and said.count(" ") + 1 >= _LONG:
            self._long["wrong"] += 1
            self._long["copied"] += said in training.long_answers
        if not item.is_closed and true.count(" ") + 1 >= _LONG:
            self._long["truths"] += 1
            self._long["known truths"] += true in training.long_answers

    def findings(self) -> dict[str, Any]:
        """Return `charges` (name, sentence, figures), `looks`, and `not_tried`."""
        looks = chance_gain(*(np.frombuffer(codes, dtype="<i8") for codes in self._codes()))
        charges = [
            charge
            for charge in (self._yes_sayer("yes"), self._yes_sayer("no"), _blind(looks))
            if charge is not None
        ]
        charges += self._copier()
        return {"charges": charges, "looks": looks, "not_tried": list(self._not_tried(looks))}

    def num_others(self, other: Witness, ours: Sequence[int], theirs: Sequence[int]) -> int:
        """Return how many paired items differ in question and truth; a prompt may differ alone."""
        asked, _, true = (np.frombuffer(codes, dtype="<i8")[ours] for codes in self._codes())
        also, _, known = (np.frombuffer(codes, dtype="<i8")[theirs] for codes in other._codes())
        return int(((asked != also) & (true != known)).sum())

    def _codes(self) -> tuple[bytearray, bytearray, bytearray]:
        return self._questions, self._said, self._true

    def _yes_sayer(self, word: str) -> dict[str, Any] | None:
        other = "no" if word == "yes" else "yes"
        against = sum(n for (gold, _), n in self._saying.items() if gold == other)
        for_it = sum(n for (gold, _), n in self._saying.items() if gold == word)
        said = self._saying[other, word]
        if against < FEWEST or said < _ALWAYS * against or self._saying[word, word] < 0.5 * for_it:
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
            wrong, copied = self._num_wrong_lookups[name], self._copied[name]
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
        wrong, copied = self._long["wrong"], self._long["copied"]
        # Where the truths stand in train as well, answers follow a pattern and prove nothing.
        is_patterned = self._long["known truths"] > 0.2 * self._long["truths"]
        if wrong >= FEWEST and copied >= _COPIED * wrong and not is_patterned:
            share = 100 * copied / wrong
            return [
                {
                    "name": "copier",
                    "sentence": f"copier from train: {share:.1f}% of its {wrong:,} wrong answers "
                    f"of {_LONG} words or more are training answers word for word",
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
        if self._training is None:
            yield "copier (no --train)"
        elif max([*self._num_wrong_lookups.values(), self._long["wrong"]], default=0) < FEWEST:
            yield f"copier (train answers fewer than {FEWEST} of these questions wrongly)"

    def _of_truth(self, word: str) -> int:
        return sum(count for (gold, _), count in self._saying.items() if gold == word)


@lru_cache(maxsize=1 << 12)
def _code(text: str) -> bytes:
    """Return 64 bits of a text: a million texts share one by a chance of 3e-8.

    Not Python's own hash, which is salted: sums over questions would change in their last digits.
    """
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


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
