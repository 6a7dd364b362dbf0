"""PathVQA's own evaluation script (METRICS, section 2.3): letters only, F1, "exact match", BLEU.

It knows no closed rule: yes/no answers are rated like all others. Words are what is left when
everything but a-z, A-Z and the space is deleted, so that hyphened words and lines run together.
"""

from __future__ import annotations

import math
import string
from functools import lru_cache, partial

from clover.evaluate.protocol.base import Item, Protocol, Rating
from clover.evaluate.protocol.bleu import matches
from clover.evaluate.protocol.llava_med import exact_score, listed, token_scores
from clover.evaluate.protocol.normalise import first_yes_no

_NOT_LETTERS = bytes(set(range(256)) - set(f"{string.ascii_letters} ".encode()))


@lru_cache(maxsize=64)
def _letters(text: str) -> list[str]:
    letters = text.encode("ascii", "ignore").translate(None, _NOT_LETTERS)
    return letters.decode("ascii").lower().split()


def rate(item: Item) -> Rating:
    """Rate one item, open or closed; where the script returns "0 (warning ...)" this is 0."""
    said, gold = listed(_letters(item.prediction)), listed(_letters(item.answer))
    _, _, f1 = token_scores(said, gold)
    label = first_yes_no(item.prediction) if item.is_closed else None
    return Rating(f1=f1, exact=exact_score(said, gold), label=label)


def bleu(prediction: str, answer: str, order: int) -> float | None:
    """Return the script's BLEU with `order` equal weights, or None where it divides by zero.

    Its brevity penalty compares lengths in characters, and orders without a match are passed over.
    """
    if not prediction:
        return None
    said, gold = _letters(prediction), _letters(answer)
    total = 0.0
    for length in range(1, order + 1):
        hits, among = matches(said, gold, length)
        if not among:
            return None
        if hits:
            total += 1 / order * math.log(hits / among)
    is_longer = len(prediction) > len(answer)
    penalty = 1.0 if is_longer else math.exp(1 - len(answer) / len(prediction))
    return penalty * math.exp(total)


def extras(item: Item) -> dict[str, float | None]:
    """Return the script's BLEU for one to four equal weights."""
    of_order = partial(bleu, item.prediction, item.answer)
    return {f"bleu_n{order}": of_order(order) for order in (1, 2, 3, 4)}


PATHVQA = Protocol("pathvqa-official", "evaluation_script (dd51804)", rate, extras)
