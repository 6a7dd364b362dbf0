"""The rules of LLaVA-Med v1.0.0, with their oddities, because published numbers depend on them.

Three scripts, three closed rules (METRICS, section 2.1): `llava-med` (run_eval), `llava-med-batch`
(run_eval_batch) and `llava-med-pvqa` (run_eval_pvqa). All test for substrings, so that gold "no"
is hit by "normal" and "nodule".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from clover.evaluate.protocol.base import DROPPED, Item, Protocol, Rating
from clover.evaluate.protocol.bleu import sentence_bleu
from clover.evaluate.protocol.normalise import (
    LONGEST_REMEMBERED,
    first_yes_no,
    remembered,
    vqa_normalise,
)


class Words(NamedTuple):
    """A text's words as they come, and which ones there are."""

    listed: list[str]
    distinct: set[str]


def listed(words: list[str]) -> Words:
    """Return words with the set of them."""
    return Words(words, set(words))


@remembered
def normal(text: str) -> str:
    """Return the lower-cased, normalised text that the closed rules read."""
    return vqa_normalise(text.lower())


@remembered
def metric_words(text: str) -> Words:
    """Return the words of a text that the caller, and again the metric, has normalised."""
    once = normal(text)
    # The second pass changes something only where a full stop is left.
    return listed((vqa_normalise(once) if "." in once else once).split())


def token_scores(said: Words, gold: Words) -> tuple[float, float, float]:
    """Return precision, recall and F1, each in 0..1.

    True positives are counted in the prediction alone: a matched word that is repeated raises
    recall, and the gold count of a matched word is never looked at.

    Source: METRICS, section 1.3.
    """
    hits = sum(map(gold.distinct.__contains__, said.listed))
    if not hits:
        return 0.0, 0.0, 0.0
    missed = len(gold.listed) - sum(map(said.distinct.__contains__, gold.listed))
    precision = hits / len(said.listed)
    recall = hits / (hits + missed)
    return precision, recall, 2 * precision * recall / (precision + recall)


def exact_score(said: Words, gold: Words) -> float:
    """Return distinct gold words found / words of the prediction: "exact match" by name only.

    Source: METRICS, section 1.4.
    """
    if not said.listed:
        return 0.0
    return len(said.distinct & gold.distinct) / len(said.listed)


def _open_rating(prediction: str, answer: str) -> Rating:
    said, gold = metric_words(prediction), metric_words(answer)
    precision, recall, f1 = token_scores(said, gold)
    return Rating(recall=recall, precision=precision, f1=f1, exact=exact_score(said, gold))


_known_open_rating = lru_cache(maxsize=1 << 12)(_open_rating)


def rate_open(item: Item) -> Rating:
    """Rate an open item; the three scripts, and Quilt-LLaVA's, agree on it."""
    if len(item.prediction) + len(item.answer) > LONGEST_REMEMBERED:
        return _open_rating(item.prediction, item.answer)
    return _known_open_rating(item.prediction, item.answer)


def _label(said: str) -> str | None:
    """Read a prediction as the substring rules do, the first whole word first."""
    if word := first_yes_no(said):
        return word
    if "yes" in said:
        return "yes"
    return "no" if "no" in said else None


def rate(item: Item) -> Rating:
    """Rate as run_eval: hit if yes or no, and the gold, are substrings of the prediction."""
    if not item.is_closed:
        return rate_open(item)
    said, gold = normal(item.prediction), normal(item.answer)
    says_either = "yes" in said or "no" in said
    return Rating(closed=float(says_either and gold in said), label=_label(said))


def rate_batch(item: Item) -> Rating:
    """Rate as run_eval_batch: hit if the gold is a substring; closed items have word scores too."""
    if not item.is_closed:
        return rate_open(item)
    said, gold = normal(item.prediction), normal(item.answer)
    precision, recall, f1 = token_scores(metric_words(item.prediction), metric_words(item.answer))
    return Rating(float(gold in said), recall, precision, f1, label=_label(said))


def rate_pvqa(item: Item) -> Rating:
    """Rate as run_eval_pvqa: a wrong answer that holds yes or no is left out altogether."""
    if not item.is_closed:
        return rate_open(item)
    rating = rate(item)
    said = normal(item.prediction)
    if rating.closed == 0.0 and ("yes" in said or "no" in said):
        return rating._replace(closed=DROPPED)
    return rating


def bleu_scores(item: Item) -> dict[str, float | None]:
    """Return BLEU of an open item: four equal weights, and each of the first three orders."""
    if item.is_closed:
        return {}
    said, gold = normal(item.prediction).split(), normal(item.answer).split()
    names = ("bleu", "bleu_1", "bleu_2", "bleu_3")
    return dict(zip(names, sentence_bleu(said, gold), strict=True))


def batch_extras(item: Item) -> dict[str, float | None]:
    """Return BLEU, and run_eval_batch's open accuracy: the gold is a substring."""
    if item.is_closed:
        return {}
    found = normal(item.answer) in normal(item.prediction)
    return {**bleu_scores(item), "open_accuracy": float(found)}


class CandidateAnswers:
    """The closed list of answers that run_eval maps an open prediction onto.

    Source: METRICS, section 1.5.
    """

    def __init__(self, answers: Sequence[str | int]) -> None:
        self.texts = [vqa_normalise(str(answer)) for answer in answers]
        self._words = [set(text.split()) for text in self.texts]

    def open_accuracy(self, prediction: str, answer: str) -> float:
        """Return 1 if the candidate nearest to the prediction is the answer, else 0.

        Nearest: the largest share of the candidate's distinct words; the first of equals, hence
        the first of all for an empty prediction.
        """
        said = metric_words(prediction).distinct
        shares = [len(words & said) / len(words) if words else 0.0 for words in self._words]
        chosen = self.texts[shares.index(max(shares))]
        return float(chosen == vqa_normalise(normal(answer)))


_VERSION = "v1.0.0 (b9a98a7)"
LLAVA_MED = Protocol("llava-med", _VERSION, rate, bleu_scores)
LLAVA_MED_BATCH = Protocol("llava-med-batch", _VERSION, rate_batch, batch_extras)
LLAVA_MED_PVQA = Protocol(
    "llava-med-pvqa",
    _VERSION,
    rate_pvqa,
    bleu_scores,
    warning=(
        "llava-med-pvqa leaves wrong yes/no answers out of the denominator, which inflates closed "
        "accuracy; use it only to compare with numbers made by that script"
    ),
)
