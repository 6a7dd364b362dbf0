"""The rule of Quilt-LLaVA's quilt_eval, for PathVQA and QUILT-VQA (METRICS, section 2.2).

Closed: "no" if a whole word of the normalised prediction is no or not, else "yes" - so silence,
"unclear" and "negative" are yes. Open: as LLaVA-Med.
"""

from __future__ import annotations

from clover.evaluate.protocol.base import Item, Protocol, Rating
from clover.evaluate.protocol.llava_med import bleu_scores, normal, rate_open


def rate(item: Item) -> Rating:
    """Rate one item.

    Gold is `yes_no_answer` where there is one, else the normalised answer; where that is neither
    yes nor no the published script stops, and here the item has no rating.
    """
    if not item.is_closed:
        return rate_open(item)
    words = normal(item.prediction).replace(",", "").split(" ")
    label = "no" if "no" in words or "not" in words else "yes"
    gold = item.yes_no_answer.lower() if item.yes_no_answer else normal(item.answer)
    closed = float(label == gold) if gold in ("yes", "no") else None
    return Rating(closed=closed, label=label)


QUILT = Protocol("quilt", "quilt_eval (a7a9a4c)", rate, bleu_scores)
