"""Shards' ledgers into the ledger of the whole: each once, whatever happens in between."""

from __future__ import annotations

import shutil
from pathlib import Path

from clover.instruct.ledger import Ledger, ledger_path, writing


def shards_folder(out: Path) -> Path:
    """Return where the shards of an output lie while they are worked on: ``F.shards``."""
    return Path(f"{out}.shards")


def unmerged_shards(out: Path) -> list[Path]:
    """Return the ledgers of shards that a killed run left."""
    return sorted(shards_folder(out).glob("*.ledger.sqlite"))


def merge_shard(ledger: Ledger, out: Path) -> int:
    """Merge the ledger of one shard; what it left in flight is booked as lost.

    Args:
        ledger: The ledger of the whole.
        out: The shard's output file.

    Returns:
        The requests that the shard sent, 0 when it was merged before.

    Raises:
        CloverError: a worker is still writing it.
    """
    path = ledger_path(out)
    if not path.exists():
        return 0
    with writing(path) as books:
        books.recover()
        return ledger.merge(path)


def remove_shards(ledger: Ledger, out: Path) -> None:
    """Merge whatever is left of the shards of an output, and remove them.

    Raises:
        CloverError: a worker is still writing one of them.
    """
    for path in unmerged_shards(out):
        merge_shard(ledger, path)
    if shards_folder(out).exists():
        # A shard that was answered nothing cannot know that others were.
        ledger.close_declined()
    shutil.rmtree(shards_folder(out), ignore_errors=True)
