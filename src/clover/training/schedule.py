"""Learning rate: linear warm-up, then a cosine, as a plain function of the step."""

from __future__ import annotations

import math

from clover.core.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Return the learning rate of optimiser step `step` (the first is 0).

    Warm-up reaches the peak at step `warmup_steps`; the cosine ends at `min_learning_rate`.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    span = max(1, config.steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    low, high = config.min_learning_rate, config.learning_rate
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * progress))
