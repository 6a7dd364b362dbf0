"""Why this answer? Where the queries looked, and whether the answer hangs on it.

In: a model, one image's tokens, a question and its answer. Out: attention maps, the probability of
yes and no, and a deletion test: take away the tokens the map calls important, or as many at random,
and see how far the answer's likelihood falls. A map whose tokens matter no more than random ones
explains nothing, and is labelled so.

Source: deletion test after Samek et al. 2017 and Petsiuk et al. 2018; own label.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from clover.core.errors import CloverError
from clover.qformer.attention_map import AttentionMap, attention_map, grid_side
from clover.vision.turned import num_turns, places_of_turns

if TYPE_CHECKING:
    from clover.model import Clover

YES_NO = ("yes", "no")
SHARES = (0.1, 0.25, 0.5)
"""Shares of the image's tokens that are taken away."""
_DRAWS = 4
"""Random deletions that each one is compared with."""

Label = Literal["faithful", "weak", "not faithful"]


@dataclass(frozen=True)
class Deletion:
    """What taking tokens away did to the answer.

    Attributes:
        shares: Shares of tokens taken away.
        attended: Fall of the answer's log-likelihood without the most attended, one a share, in
            nats.
        random: The same without random tokens: the mean of several draws.
        spread: Standard deviation of the draws.
    """

    shares: tuple[float, ...]
    attended: tuple[float, ...]
    random: tuple[float, ...]
    spread: tuple[float, ...]

    @property
    def gain(self) -> float:
        """How much more the attended tokens matter than random ones, mean over shares, in nats."""
        pairs = zip(self.attended, self.random, strict=True)
        return sum(first - second for first, second in pairs) / len(self.shares)

    @property
    def label(self) -> Label:
        """What the map is worth.

        `faithful`: without the attended tokens the answer falls by more than twice the random
        draws' deviation at every share, and by 0.1 nats (a tenth of its probability) or more on
        average. `weak`: more than random on average. `not faithful`: no more than random.
        """
        if self.gain <= 0:
            return "not faithful"
        rows = zip(self.attended, self.random, self.spread, strict=True)
        is_clear = all(first > second + 2 * third for first, second, third in rows)
        return "faithful" if is_clear and self.gain >= 0.1 else "weak"


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns."""

    maps: AttentionMap
    deletion: Deletion
    yes: float | None
    """Probability of yes, yes and no taken as the only answers; None for another kind of answer."""


def look(model: Clover, features: Tensor, question: str) -> AttentionMap:
    """Return where the queries look in an image when they are asked a question.

    Args:
        model: A loaded model.
        features: The image's tokens [1, P, E], from `Clover.encode`.
        question: In words.

    Raises:
        CloverError: the encoder's tokens form no square grid.
    """
    tokens = model.question_tokens([question])
    given = features.to(model.device.device)
    read = () if tokens is None else (tokens.ids, tokens.mask)
    return attention_map(model.bridge, given, *read, places=token_places(model, features))


def token_places(model: Clover, features: Tensor) -> Tensor:
    """Return which of an image's tokens [1, P, E] show each place of it, [copies, G * G].

    Raises:
        CloverError: the encoder's tokens form no square grid.
    """
    turns, num_tokens = num_turns(model.encoder), features.shape[1]
    return places_of_turns(grid_side(num_tokens // turns), num_tokens, turns)


def explain(model: Clover, features: Tensor, question: str, answer: str) -> Explanation:
    """Return the maps of a question, and how far its answer hangs on them.

    Args:
        model: A loaded model.
        features: The image's tokens [1, P, E].
        question: In words.
        answer: What the model said, or any answer that is to be tested.

    Raises:
        CloverError: an empty answer, or tokens that form no square grid.
    """
    if not answer.strip():
        raise CloverError("the answer is empty; there is nothing to explain")
    maps = look(model, features, question)
    deletion = delete(
        features,
        maps.rollout(),
        lambda stays: likelihood(model, stays, question, answer),
        places=token_places(model, features),
    )
    is_closed = first_word(answer) in YES_NO
    return Explanation(maps, deletion, yes_probability(model, features, question, is_closed))


def first_word(answer: str) -> str:
    """Return an answer's first word in small letters, without its punctuation."""
    words = answer.strip().lower().split()
    return words[0].strip(".,;:!") if words else ""


def yes_probability(
    model: Clover, features: Tensor, question: str, is_closed: bool = True
) -> float | None:
    """Return the probability of yes, yes and no taken as the only answers; None unless closed."""
    if not is_closed:
        return None
    scores = torch.tensor(_likelihoods(model, features, question, YES_NO), dtype=torch.float64)
    return float(scores.softmax(dim=0)[0])


def likelihood(model: Clover, features: Tensor, question: str, answer: str) -> float:
    """Return the log-likelihood of an answer to a question about image tokens [1, P, E]."""
    return _likelihoods(model, features, question, [answer])[0]


def delete(
    features: Tensor,
    heat: Tensor,
    measure: Callable[[Tensor], float],
    *,
    places: Tensor | None = None,
) -> Deletion:
    """Take image tokens away and measure how far the answer's log-likelihood falls.

    The Q-Former reads a set of tokens of any number, so they are taken out, not painted over.

    Args:
        features: The image's tokens [1, P, E]; a class token before the grid always stays.
        heat: The map under test [G, G].
        measure: Returns the answer's log-likelihood for the tokens that stay. A server lets other
            answers go on between two calls.
        places: Which tokens show each place of the map, [copies, G * G]; they go together. By
            default one each, in order.
    """
    num_tokens, num_places = features.shape[1], heat.numel()
    if places is None:
        places = torch.arange(num_tokens - num_places, num_tokens)[None]
    order = heat.flatten().argsort(descending=True)
    generator = torch.Generator().manual_seed(0)

    def fall(gone: Tensor) -> float:
        stays = torch.ones(num_tokens, dtype=torch.bool)
        stays[places[:, gone.to(places.device)]] = False
        return whole - measure(features[:, stays])

    whole = measure(features)
    attended, random, spread = [], [], []
    for share in SHARES:
        count = max(round(share * num_places), 1)
        attended.append(fall(order[:count]))
        draws = torch.tensor(
            [fall(torch.randperm(num_places, generator=generator)[:count]) for _ in range(_DRAWS)]
        )
        random.append(float(draws.mean()))
        spread.append(float(draws.std()))
    return Deletion(SHARES, tuple(attended), tuple(random), tuple(spread))


@torch.no_grad()
def _likelihoods(
    model: Clover, features: Tensor, question: str, answers: list[str] | tuple[str, ...]
) -> list[float]:
    with model.device.autocast():
        prefix = model.visual_prefix(features, [question])
        return model.language.rank(prefix, question, list(answers))
