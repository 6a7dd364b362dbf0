"""Deletion test and probability of yes."""

from __future__ import annotations

import math

import pytest
import torch

from clover.core.errors import CloverError
from clover.explain import Deletion, delete, explain, likelihood, look, yes_probability
from tiny import QUESTION, Tiny, tiny_clover


def test_deletion_takes_the_hottest_tokens_first_and_leaves_a_class_token() -> None:
    features = torch.arange(17.0).view(1, 17, 1)  # token 0 is the class token
    heat = torch.zeros(4, 4)
    heat[0, 1], heat[2, 3] = 2.0, 1.0  # tokens 2 and 12
    kept: list[set[int]] = []

    def measure(stays: torch.Tensor) -> float:
        kept.append({int(value) for value in stays.flatten()})
        # The answer hangs on token 2 alone.
        return 0.0 if 2 in kept[-1] else -3.0

    found = delete(features, heat, measure)
    assert kept[0] == set(range(17))
    assert kept[1] == set(range(17)) - {2, 12} and all(0 in item for item in kept)
    assert found.attended == (3.0, 3.0, 3.0)
    assert [len(item) for item in kept[1::5]] == [15, 13, 9]
    # Random draws hit token 2 about as often as their share says.
    assert found.random[0] < 3 and found.gain > 0


@pytest.mark.parametrize(
    ("attended", "random", "spread", "label"),
    [
        ((1.0, 1.0, 1.0), (0.1, 0.1, 0.1), (0.1, 0.1, 0.1), "faithful"),
        ((1.0, 1.0, 0.2), (0.1, 0.1, 0.1), (0.1, 0.1, 0.1), "weak"),
        ((0.05, 0.05, 0.05), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), "weak"),
        ((0.1, 0.1, 0.1), (0.1, 0.2, 0.1), (0.1, 0.1, 0.1), "not faithful"),
        ((-1.0, -1.0, -1.0), (0.0, 0.0, 0.0), (0.1, 0.1, 0.1), "not faithful"),
    ],
)
def test_a_map_is_labelled_by_what_it_is_worth(
    attended: tuple[float, ...], random: tuple[float, ...], spread: tuple[float, ...], label: str
) -> None:
    assert Deletion((0.1, 0.25, 0.5), attended, random, spread).label == label


def test_yes_is_a_share_of_yes_and_no(tiny: Tiny) -> None:
    model = tiny_clover(tiny.recipe)
    features = model.encode(tiny.image())
    yes, no = (likelihood(model, features, QUESTION, word) for word in ("yes", "no"))
    wanted = math.exp(yes) / (math.exp(yes) + math.exp(no))
    assert yes_probability(model, features, QUESTION) == pytest.approx(wanted, rel=1e-4)
    assert yes_probability(model, features, QUESTION, False) is None


def test_an_explanation_is_of_this_question_and_answer(tiny: Tiny) -> None:
    model = tiny_clover(tiny.recipe)
    features = model.encode(tiny.image())
    found = explain(model, features, QUESTION, "Yes, there is")
    assert found.maps.weights.shape == (1, 4, 4, 4) and found.yes is not None
    other = look(model, features, "is there necrosis ?")
    assert not torch.allclose(other.weights, found.maps.weights)
    assert explain(model, features, QUESTION, "liver").yes is None
    with pytest.raises(CloverError, match="the answer is empty"):
        explain(model, features, QUESTION, " ")
