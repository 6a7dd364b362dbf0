"""What a terminal shows: progress on long work, silent elsewhere, and aligned tables."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

Advance = Callable[..., None]
"""`advance(count=1, note="loss 1.2")` moves the bar."""


@contextlib.contextmanager
def progress(title: str, total: int | None, *, done: int = 0) -> Iterator[Advance]:
    """Yield a function that moves a progress bar; silent when stderr is not a terminal.

    Of several processes that `torchrun` started at one terminal the first one shows its own.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    is_shown = console.is_terminal and os.environ.get("RANK", "0") == "0"
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not is_shown) as bar:
        task = bar.add_task(title, total=total, completed=done, note="")

        def advance(count: int = 1, note: str | None = None) -> None:
            if note is None:
                bar.advance(task, count)
            else:
                bar.update(task, advance=count, note=note)

        yield advance


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines, columns padded to their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
