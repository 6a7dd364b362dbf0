"""The smallest objective there is, and a job for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from clover.core.config import OptimizerConfig
from clover.core.run import RunFolder
from clover.training.device import choose_device
from clover.training.loop import TrainingJob
from clover.training.objective import Losses


class Line:
    """Fit one weight to numbers: small enough to compute by hand."""

    def __init__(self, values: Sequence[float]) -> None:
        self.module = nn.Linear(1, 1, bias=False)
        self.values = torch.tensor(values)
        self.announced: list[tuple[list[int], list[int]]] = []

    def num_samples(self) -> int:
        return len(self.values)

    def sizes(self) -> None:
        return None

    def names(self, indices: Sequence[int]) -> list[str]:
        return [f"record-{index}" for index in indices]

    def announce(self, indices: Sequence[int], draws: Sequence[int]) -> None:
        self.announced.append((list(indices), list(draws)))

    def collate(self, indices: Sequence[int]) -> Tensor:
        return self.values[list(indices)]

    def losses(self, batch: Tensor) -> Losses:
        total = (self.module.weight[0, 0] * batch).sum()
        return Losses(total, torch.tensor(float(len(batch))))


def job_of(folder: Path, **settings: object) -> TrainingJob:
    config = OptimizerConfig.model_validate({"steps": 3, "batch_size": 8, **settings})
    return TrainingJob("line", config, RunFolder(folder), choose_device("cpu", "float32"), 0, "key")
