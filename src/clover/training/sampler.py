"""Which samples a step sees: a pure function of seed and step, so resuming needs no state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_CHUNK = 32  # batches that are sorted by length together: long enough to pay, short enough to mix


class Sampler:
    """Shuffled epochs of full batches.

    Args:
        num_samples: How many samples there are.
        batch_size: Samples a batch; the rest of an epoch that fills no batch is left out, and is
            another rest in the next epoch.
        seed: Another seed, another order.
        sizes: A length a sample; batches then hold like lengths, in shuffled order.
    """

    def __init__(
        self, num_samples: int, batch_size: int, *, seed: int, sizes: Sequence[int] | None = None
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = min(batch_size, num_samples)
        self.batches_per_epoch = num_samples // self.batch_size
        self._seed = seed
        self._sizes = None if sizes is None else np.asarray(sizes)
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def batch(self, index: int) -> list[int]:
        """Return the samples of batch `index`, counted from the start of training."""
        epoch, position = divmod(index, self.batches_per_epoch)
        if epoch != self._epoch:
            self._order, self._epoch = self._shuffle(epoch), epoch
        chosen: list[int] = self._order[position].tolist()
        return chosen

    def _shuffle(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng(np.random.SeedSequence([self._seed, epoch]))
        order = random.permutation(self.num_samples)
        order = order[: self.batches_per_epoch * self.batch_size]
        if self._sizes is not None:
            chunk = self.batch_size * _CHUNK
            parts = [order[start : start + chunk] for start in range(0, len(order), chunk)]
            order = np.concatenate(
                [part[np.argsort(self._sizes[part], kind="stable")] for part in parts]
            )
        batches = order.reshape(-1, self.batch_size)
        if self._sizes is not None:
            batches = batches[random.permutation(len(batches))]
        return batches
