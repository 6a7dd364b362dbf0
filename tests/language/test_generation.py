"""How the next token is chosen at the edges of what may be asked."""

from __future__ import annotations

import pytest
import torch

from clover.language.generation import next_token
from clover.language.protocol import GenerationSettings

LOGITS = [0.5, 3.0, -1.0, 2.9, 12.0, 11.9]
BEST = 4


def chosen(**settings: float) -> set[int]:
    """Return what is chosen under several seeds."""
    return {
        next_token(
            torch.tensor(LOGITS),
            [],
            GenerationSettings(min_tokens=0, **settings),
            torch.Generator().manual_seed(seed),
            stop_ids=frozenset(),
        )
        for seed in range(20)
    }


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-40, 1e-20, 1e-6])
def test_a_tiny_temperature_is_greedy_as_its_limit_is(temperature: float) -> None:
    assert chosen(temperature=temperature) == {BEST}
    assert chosen(temperature=temperature, top_p=0.5) == {BEST}


@pytest.mark.parametrize("top_p", [5e-324, 1e-46, 1e-40, 0.1])
def test_a_tiny_top_p_keeps_the_best_token(top_p: float) -> None:
    assert chosen(temperature=1.0, top_p=top_p) == {BEST}


def test_a_temperature_that_is_not_tiny_still_samples() -> None:
    assert len(chosen(temperature=1.0)) > 1
