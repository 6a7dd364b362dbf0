"""The default protocol: nothing is read into an answer.

Closed: the first whole word yes or no of the prediction must be the gold; a prediction without
one is unparsed and wrong. Open: precision, recall and F1 over words with minimum counts, and exact
match, after the strict normalisation.
"""

from __future__ import annotations

from collections import Counter

from clover.evaluate.protocol.base import Item, Protocol, Rating
from clover.evaluate.protocol.normalise import first_yes_no, strict_words


def strict_form(text: str) -> str:
    """Return a text's normal form, by which answers are equal or not."""
    return " ".join(strict_words(text))


def gold_label(item: Item) -> str | None:
    """Return the yes or no that is right, or None when the truth names neither."""
    return first_yes_no(item.yes_no_answer or item.answer)


def word_scores(prediction: str, answer: str) -> tuple[float, float, float, float]:
    """Return precision, recall, F1 and exact match of two texts, each in 0..1.

    A word counts as found as often as it stands in both texts. An empty prediction, or an empty
    answer, matches nothing.
    """
    said, gold = strict_words(prediction), strict_words(answer)
    distinct, sought = set(said), set(gold)
    common = len(distinct & sought)
    if not common:
        return 0.0, 0.0, 0.0, 0.0
    if len(distinct) < len(said) and len(sought) < len(gold):  # else none stands twice in both
        common = (Counter(said) & Counter(gold)).total()
    precision = common / len(said)
    recall = common / len(gold)
    f1 = 2 * precision * recall / (precision + recall)
    return precision, recall, f1, float(said == gold)


def rate(item: Item) -> Rating:
    """Rate one item; a closed item whose truth names neither yes nor no has no rating."""
    if item.is_closed:
        label = first_yes_no(item.prediction)
        gold = gold_label(item)
        return Rating(closed=None if gold is None else float(label == gold), label=label)
    precision, recall, f1, exact = word_scores(item.prediction, item.answer)
    return Rating(recall=recall, precision=precision, f1=f1, exact=exact)


STRICT = Protocol(name="strict", version="1", rate=rate)
