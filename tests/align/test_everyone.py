"""Two processes of B pairs are one process of 2B: losses, gradients, who may be a negative."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clover.align.contrast import contrastive_loss, same_caption, similarity
from clover.align.losses import AlignmentLosses, Everyone, LossSettings, alignment_losses
from clover.align.match import Negatives
from clover.core.config import QFormerConfig
from clover.qformer.bridge import Bridge
from clover.qformer.tokenizer import Tokens
from clover.training import processes
from together import run_together

pytestmark = pytest.mark.alone  # forks

SIZE, PAIRS, WORDS = 2, 8, 20
LENGTHS = (7, 3, 5, 4, 2, 6, 3, 4)
"""Of the captions: the longest text of the second process is shorter than the first one's."""
CONFIG = QFormerConfig(
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    intermediate_size=24,
    vocab_size=WORDS,
    max_positions=16,
    encoder_width=12,
    num_queries=3,
    embedding_size=8,
    dropout=0.0,
    initializer_range=0.2,
)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Return features [8, 5, 12], ids and mask [8, 7]; captions 1 and 6 say the same."""
    random = torch.Generator().manual_seed(3)
    features = torch.randn(PAIRS, 5, 12, generator=random)
    ids = torch.randint(4, WORDS - 1, (PAIRS, max(LENGTHS)), generator=random)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
    ids[6, :3] = ids[1, :3]
    return features, ids * mask, mask


def negatives() -> Negatives:
    """Return forced ones, most of them of the other process."""
    return Negatives(torch.tensor([5, 2, 7, 4, 1, 6, 0, 3]), torch.tensor([4, 7, 0, 6, 5, 3, 2, 1]))


def part_of(rank: int, size: int) -> tuple[Bridge, Tensor, Tokens, dict[str, Any]]:
    """Return a bridge, one process's images and texts, and what the losses are told besides."""
    torch.manual_seed(0)
    bridge = Bridge(CONFIG, has_alignment=True).train()
    features, ids, mask = batch()
    share = PAIRS // size
    part = slice(rank * share, (rank + 1) * share)
    width = int(mask[part].sum(dim=1).max())
    text = Tokens(ids[part, :width], mask[part, :width])
    chosen = negatives()
    told = {
        "everyone": Everyone.gather(features[part], text) if size > 1 else None,
        "negatives": Negatives(chosen.image_for_text[part], chosen.text_for_image[part]),
    }
    return bridge, features[part], text, told


def losses_of(rank: int, size: int, **settings: Any) -> tuple[AlignmentLosses, Bridge, int]:
    """Return the losses of one process's part of the batch."""
    bridge, features, text, told = part_of(rank, size)
    how = LossSettings(WORDS - 1, **settings)
    found = alignment_losses(bridge, bridge.read_image(features), text, how, **told)
    return found, bridge, len(features)


def gradients_of(rank: int, size: int, **settings: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Return the gradients of the mean over all pairs, as the loop makes it, and its value."""
    found, bridge, share = losses_of(rank, size, **settings)
    total = found.total * share
    total.backward()
    learning = list(bridge.parameters())
    processes.sum_gradients(learning)
    gradients = {
        name: item.grad / PAIRS for name, item in bridge.named_parameters() if item.grad is not None
    }
    return gradients, processes.sum_over_processes(total.detach()) / PAIRS


@pytest.mark.parametrize("ignore_duplicates", [False, True])
@pytest.mark.parametrize("is_detached", [False, True])
def test_two_processes_of_four_pairs_are_one_of_eight(
    is_detached: bool, ignore_duplicates: bool, tmp_path: Path
) -> None:
    settings = {"detach_gathered": is_detached, "ignore_duplicates": ignore_duplicates}
    alone, loss = gradients_of(0, 1, **settings)
    both = run_together(lambda rank: gradients_of(rank, SIZE, **settings), tmp_path)
    for gradients, value in both:
        assert abs(float(value - loss)) <= 1e-5
        assert gradients.keys() == alone.keys()
        for name, wanted in alone.items():
            # The temperature's gradient is about 20: a digit more than the others' to round.
            torch.testing.assert_close(gradients[name], wanted, atol=1e-5, rtol=1e-6, msg=name)


def test_detaching_and_ignoring_duplicates_change_the_gradient() -> None:
    """Else the test above would say nothing about them."""
    plain, _ = gradients_of(0, 1)
    for settings in ({"detach_gathered": True}, {"ignore_duplicates": True}):
        other, _ = gradients_of(0, 1, **settings)
        furthest = max(float((other[name] - item).abs().max()) for name, item in plain.items())
        assert furthest > 1e-3, settings


def test_the_gather_carries_gradient_to_where_rows_came_from(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[Tensor, Tensor]:
        own = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) + 10 * rank
        own.requires_grad_()
        rows = processes.gather_rows(own, with_gradient=True)
        weight = torch.arange(8.0).view(4, 2) * (rank + 1)
        (rows * weight).sum().backward()
        assert own.grad is not None
        return rows.detach(), own.grad

    first, second = run_together(work, tmp_path)
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [11.0, 12.0], [13.0, 14.0]])
    assert torch.equal(first[0], rows) and torch.equal(second[0], rows)
    # Both processes' losses, with weights 1 and 2, reach each row.
    assert torch.equal(torch.cat([first[1], second[1]]), 3 * torch.arange(8.0).view(4, 2))


def test_a_row_of_the_second_process_finds_its_target_behind_the_firsts() -> None:
    torch.manual_seed(0)
    images, texts, temperature = torch.randn(4, 2, 3), torch.randn(4, 3), torch.tensor(0.5)
    whole = similarity(images, texts, temperature)
    parts = []
    for offset in (0, 2):
        rows = slice(offset, offset + 2)
        own = similarity(images[rows], texts[rows], temperature, all_image=images, all_text=texts)
        parts.append(contrastive_loss(own, label_smoothing=0.1, offset=offset))
    torch.testing.assert_close(
        torch.stack(parts).mean(), contrastive_loss(whole, label_smoothing=0.1)
    )


def test_duplicates_are_found_in_other_processes_texts() -> None:
    _, ids, mask = batch()
    whole = same_caption(ids, mask)
    assert whole.nonzero().tolist() == [[1, 6], [6, 1]]
    assert torch.equal(same_caption(ids, mask, offset=4, size=4), whole[4:])


def test_negatives_are_drawn_from_all_processes_and_never_the_own_pair(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[list[int], list[int]]:
        from clover.align.match import sample_negatives

        torch.manual_seed(rank)
        vectors = torch.randn(2, 3)
        texts = processes.gather_rows(vectors)
        own = similarity(
            vectors[:, None], vectors, torch.tensor(50.0), all_image=texts[:, None], all_text=texts
        )
        images, others = set(), set()
        for _ in range(60):
            found = sample_negatives(own, offset=2 * rank)
            images.add(int(found.image_for_text[0]))
            others.add(int(found.text_for_image[1]))
        return sorted(images), sorted(others)

    assert run_together(work, tmp_path) == [([1, 2, 3], [0, 2, 3]), ([0, 1, 3], [0, 1, 2])]
