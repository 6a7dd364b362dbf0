"""What a file of pairs has cost, by whatever steps it was made: its ledger, or its card's ledgers.

A step that makes pairs of other pairs (filter, mix) writes a card beside its output,
``F.card.json``, that names the ledgers of its inputs, from the card's own folder, with their
totals. So the cost stays with the pairs; a ledger that can still be found there is read anew, and
one that two files go back to is counted once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from clover.core.errors import CloverError
from clover.core.files import read_json
from clover.instruct.ledger import Ledger, ledger_path


def card_path(out: str | Path) -> Path:
    """Return where the card of a file of pairs lies: ``F.card.json``."""
    return Path(f"{out}.card.json")


def ledgers_of(files: Iterable[Path], *, out: Path) -> list[dict[str, Any]]:
    """Return the totals of all ledgers that files of pairs go back to, for the card of `out`.

    Args:
        files: Pairs, as generate, filter or mix wrote them.
        out: The file that is made of them; `ledger` in a row is a path from its folder.
    """
    found: dict[Path, dict[str, Any]] = {}
    for file in files:
        for row in _rows_of_card(file):
            found[(file.parent / str(row["ledger"])).resolve()] = row
        own = ledger_path(file)
        if own.exists():
            found[own.resolve()] = {}
    for path in found:
        if path.exists():
            with Ledger(path) as ledger:
                found[path] = ledger.totals().row()
    folder = out.parent.resolve()
    return [{**row, "ledger": os.path.relpath(path, folder)} for path, row in found.items()]


def total_usd(rows: Iterable[dict[str, Any]]) -> float:
    """Return the dollars of all ledgers, to a millionth."""
    return round(sum(float(row["usd"]) for row in rows), 6)


def _rows_of_card(file: Path) -> list[dict[str, Any]]:
    path = card_path(file)
    if not path.exists():
        return []
    card = read_json(path)
    rows = card.get("ledgers", []) if isinstance(card, dict) else None
    is_ours = isinstance(rows, list) and all(
        isinstance(row, dict) and "ledger" in row and isinstance(row.get("usd"), int | float)
        for row in rows
    )
    if not is_ours:
        raise CloverError(f"{path} is not a card of filter or mix; move it away")
    return list(rows or [])
