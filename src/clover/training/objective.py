"""The seam between the loop and what is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Losses:
    """A loss as sum and count, so that unequal batches add up to the right mean.

    Attributes:
        sum: Of the loss; the loop goes back through it, unless that is done.
        count: What it is a sum over.
        parts: Numbers worth logging: detached scalars, already means.
        is_backward_done: Whether the gradients of `sum` are in the weights already.
    """

    sum: Tensor
    count: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    is_backward_done: bool = False


class Objective(Protocol):
    """What a stage gives the loop."""

    @property
    def module(self) -> nn.Module:
        """The module that learns; it is what a checkpoint holds."""
        ...

    def num_samples(self) -> int:
        """Return how many training samples there are."""
        ...

    def sizes(self) -> Sequence[int] | None:
        """Return a length for each sample, to batch like with like; None for no bucketing."""
        ...

    def names(self, indices: Sequence[int]) -> list[str]:
        """Return what a user knows these samples by, for messages about them."""
        ...

    def announce(self, indices: Sequence[int], draws: Sequence[int]) -> None:
        """Take note of a batch that `collate` will be asked for some steps later.

        Args:
            indices: Its samples [B].
            draws: A random number for each [B], for what is drawn for a sample when it is loaded:
                the same ones however often training stopped, and in however many processes.
        """
        ...

    def collate(self, indices: Sequence[int]) -> Any:
        """Load the samples with these indices as a batch."""
        ...

    def losses(self, batch: Any) -> Losses:
        """Compute the loss of a batch."""
        ...
