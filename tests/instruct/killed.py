"""Run generation in children that are killed at random moments; imports are paid once.

python killed.py CAPTIONS OUT ENDPOINT KILLS SEED
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import sqlite3
import sys
import time
from pathlib import Path

from clover.instruct.generate import GenerateSettings, generate_file
from clover.instruct.ledger import ledger_path
from clover.instruct.prices import Price


def num_attempts(out: str) -> int:
    """Return how many requests the ledger has booked."""
    path = ledger_path(out)
    if not path.exists():
        return 0
    with contextlib.closing(sqlite3.connect(path, timeout=10)) as database:
        try:
            return int(database.execute("SELECT COUNT(*) FROM attempts").fetchone()[0])
        except sqlite3.OperationalError:
            return 0  # killed before its tables were made


def main() -> None:
    import tenacity  # noqa: F401

    captions, out, endpoint, kills, seed = sys.argv[1:]
    settings = GenerateSettings(
        endpoint=endpoint, model="small-model", price=Price(0.5, 1.5), concurrency=8, timeout_s=10
    )
    # Imports, word lists and the first request's own cost: once before the forks, not in each.
    first = dataclasses.replace(settings, limit=1)
    generate_file(Path(captions), out=Path(f"{out}.first"), settings=first)
    rng = random.Random(int(seed))
    for number in range(int(kills)):
        before = num_attempts(out)
        child = os.fork()
        if child == 0:
            generate_file(Path(captions), out=Path(out), settings=settings)
            os._exit(0)
        # One in four dies while it starts, the others while requests are on their way.
        while number % 4 and num_attempts(out) <= before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.25))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    print(generate_file(Path(captions), out=Path(out), settings=settings).sent)


if __name__ == "__main__":
    main()
