"""BLEU of one sentence, written from its definition, without smoothing."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence


def matches(prediction: Sequence[str], answer: Sequence[str], order: int) -> tuple[int, int]:
    """Return how many n-grams of the prediction are in the answer (clipped), and of how many."""
    said = Counter(zip(*(prediction[at:] for at in range(order)), strict=False))
    gold = Counter(zip(*(answer[at:] for at in range(order)), strict=False))
    return sum(min(count, gold[gram]) for gram, count in said.items()), said.total()


def sentence_bleu(
    prediction: Sequence[str], answer: Sequence[str]
) -> tuple[float, float, float, float]:
    """Return BLEU with four equal weights, and with all the weight on orders 1, 2 and 3.

    An order without a match enters as the smallest normal float, as in the library that the
    published scorers call; without any matching word BLEU is 0.

    Source: Papineni et al. 2002, equations 2 to 4; METRICS, section 1.6.
    """
    found = [matches(prediction, answer, order) for order in (1, 2, 3, 4)]
    if not found[0][0]:
        return 0.0, 0.0, 0.0, 0.0
    logs = [
        math.log(hits / total) if hits else math.log(sys.float_info.min) for hits, total in found
    ]
    brevity = 1.0 if len(prediction) > len(answer) else math.exp(1 - len(answer) / len(prediction))
    uniform = brevity * math.exp(math.fsum(0.25 * value for value in logs))
    first, second, third = (brevity * math.exp(value) for value in logs[:3])
    return uniform, first, second, third
