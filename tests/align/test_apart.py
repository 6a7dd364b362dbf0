"""Losses taken one after another have the gradients of their sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_everyone import CONFIG, PAIRS, WORDS, batch, gradients_of, negatives, part_of
from torch import Tensor

from clover.align.apart import backward_apart
from clover.align.losses import (
    ALL_LOSSES,
    LossSettings,
    alignment_losses,
    larger_matching_parts,
    match_logits,
    pair_logits,
)
from clover.align.match import matching_loss, matching_share
from clover.qformer.bridge import Bridge
from clover.qformer.tokenizer import Tokens
from clover.training import processes
from together import run_together


def apart(rank: int, size: int, **settings: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return gradients of the mean over all pairs, and the losses of this process."""
    bridge, features, text, told = part_of(rank, size)
    how = LossSettings(WORDS - 1, **settings)
    found = backward_apart(bridge, features, text, how, scale=len(features), **told)
    processes.sum_gradients(list(bridge.parameters()))
    gradients = {
        name: item.grad / PAIRS for name, item in bridge.named_parameters() if item.grad is not None
    }
    return gradients, found.parts


@pytest.mark.parametrize("which", [ALL_LOSSES, ("contrast",), ("match",), ("caption", "match")])
@pytest.mark.parametrize("is_detached", [False, True])
def test_gradients_are_those_of_the_sum(which: tuple[str, ...], is_detached: bool) -> None:
    settings = {"which": which, "detach_gathered": is_detached, "ignore_duplicates": True}
    expected, _ = gradients_of(0, 1, **settings)
    found, losses = apart(0, 1, **settings)
    assert list(losses) == [name for name in ALL_LOSSES if name in which]
    assert not any(value.requires_grad for value in losses.values())
    for name, item in expected.items():
        if item.any():
            torch.testing.assert_close(found[name], item, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.alone  # forks
@pytest.mark.parametrize("is_detached", [False, True])
def test_two_processes_are_one(is_detached: bool, tmp_path: Path) -> None:
    expected, _ = gradients_of(0, 1, detach_gathered=is_detached)
    both = run_together(lambda rank: apart(rank, 2, detach_gathered=is_detached)[0], tmp_path)
    for gradients in both:
        for name, wanted in expected.items():
            torch.testing.assert_close(gradients[name], wanted, atol=1e-5, rtol=0, msg=name)


def test_in_bfloat16_products_the_gradients_stay_near() -> None:
    expected, _ = gradients_of(0, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = apart(0, 1)
    for name, wanted in expected.items():
        assert found[name].dtype == torch.float32
        limit = 0.1 * float(wanted.norm()) + 1e-2
        assert float((found[name] - wanted).norm()) < limit, name


def test_losses_are_those_of_the_sum() -> None:
    torch.manual_seed(0)
    bridge = Bridge(CONFIG, has_alignment=True).eval()
    features, ids, mask = batch()
    text = Tokens(ids, mask)
    how, told = LossSettings(WORDS - 1), {"negatives": negatives()}
    whole = alignment_losses(bridge, bridge.read_image(features), text, how, **told)
    found = backward_apart(bridge, features, text, how, **told)
    for name, value in whole.parts.items():
        torch.testing.assert_close(found.parts[name], value.detach(), rtol=1e-6, atol=1e-6)


def test_larger_parts_hold_the_same_pairs() -> None:
    torch.manual_seed(0)
    bridge = Bridge(CONFIG, has_alignment=True).eval()
    features, ids, mask = batch()
    text, chosen = Tokens(ids, mask), negatives()
    image = bridge.read_image(features)
    whole = match_logits(bridge, image, text, chosen)  # own, negative images, negative texts
    first, second = larger_matching_parts(image, text, chosen)
    both = pair_logits(bridge, first).view(PAIRS, 2, 2)
    torch.testing.assert_close(both[:, 0], whole[:PAIRS])
    torch.testing.assert_close(both[:, 1], whole[2 * PAIRS :])
    torch.testing.assert_close(pair_logits(bridge, second), whole[PAIRS : 2 * PAIRS])
    shares = [
        matching_share(pair_logits(bridge, part), part.is_match, pairs=3 * PAIRS)
        for part in (first, second)
    ]
    torch.testing.assert_close(sum(shares), matching_loss(whole))
