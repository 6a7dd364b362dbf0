"""Seconds that training waits for a checkpoint: written by the loop, or beside it.

python -m benchmarks.checkpoint [MILLIONS]

A module of so many million numbers (19 as the demo's Q-Former) and AdamW's two moments of each. A
save comes when the one before is written, so that only this one is waited for.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from benchmarks.figure import alternating, print_figure
from clover.core.memory import keep_freed_memory
from clover.training.background import BackgroundWriter
from clover.training.checkpoint import save_checkpoint
from clover.training.loop import make_optimizer


def main(arguments: list[str]) -> int:
    """Print both figures and their ratio."""
    millions = int(arguments[0]) if arguments else 19
    torch.set_num_threads(1)
    keep_freed_memory()  # as the loop does
    module = nn.Sequential(*[nn.Linear(1000, 1000, bias=False) for _ in range(millions)])
    optimizer = make_optimizer(module, learning_rate=1e-4, weight_decay=0.05)
    for item in module.parameters():
        item.grad = torch.ones_like(item)
    optimizer.step()
    with tempfile.TemporaryDirectory() as folder, BackgroundWriter() as writer:

        def save(beside: BackgroundWriter | None) -> None:
            save_checkpoint(
                Path(folder), step=1, module=module, optimizer=optimizer, key="", writer=beside
            )

        waited, wall = [], []
        for _ in range(3):
            plain, beside, _ = alternating(
                # The third waits for what the second began, outside of both times.
                [lambda: save(None), lambda: save(writer), lambda: writer.start(lambda: None)]
            )
            wall.append(plain)
            waited.append(beside)
    details = {"million_numbers": millions, "bytes": 12 * 1_000_000 * millions}
    print_figure("checkpoint, written by the loop", sorted(wall)[1], "s", **details)
    print_figure("checkpoint, copied for the writer", sorted(waited)[1], "s", **details)
    print_figure("loop / writer", sorted(wall)[1] / sorted(waited)[1], "times", **details)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
