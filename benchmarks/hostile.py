"""Ten thousand requests, one in a hundred hostile: statuses, and memory before and after.

python -m benchmarks.hostile [--requests 10000]

Serves the tests' tiny model in a process of its own: what is measured is the server, not the model.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.serve import hostile
from tests.serve.running import Running, running, tiny_folder

from benchmarks.figure import print_figure

WARM = 1000
"""Requests, as mixed, after which memory is looked at first: allocators and caches have filled."""


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--hostile", type=float, default=0.01, help="share of hostile ones")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_folder(Path(folder))[1]
        with running(f"tiny={model}", "--max-waiting", "256") as server:
            load(server, WARM, options.hostile, seed=0)
            before = server.resident_bytes()
            start = time.perf_counter()
            statuses = load(server, options.requests, options.hostile, seed=1)
            seconds = time.perf_counter() - start
            after = server.resident_bytes()
            alive = hostile.send(server.port, hostile.asked(hostile.small())) == 200
    failed = sum(count for status, count in statuses.items() if status >= 500)
    named = {str(status): count for status, count in sorted(statuses.items())}
    print_figure("requests answered with a 5xx", failed, "requests", statuses=named, alive=alive)
    print_figure("requests a second", options.requests / seconds, "requests/s")
    print_figure(
        "resident memory after against before", after / before, "ratio", before_mib=before / 2**20
    )
    return 0 if not failed and alive else 1


def load(server: Running, count: int, share: float, *, seed: int) -> Counter[int]:
    """Send requests over 8 connections at a time; return how often each status came."""
    dice = random.Random(seed)
    small = hostile.small()
    with ThreadPoolExecutor(8) as pool:
        sent = []
        for number in range(count):
            if dice.random() >= share:
                sent.append(
                    pool.submit(hostile.send, server.port, hostile.asked(small, seed=number))
                )
            elif dice.random() < 0.2:
                content = hostile.asked(small, n=2)
                cut = dice.randrange(len(content))
                sent.append(pool.submit(hostile.send, server.port, content, leave_after=cut))
            else:
                attack = dice.choice(hostile.ATTACKS)(random.Random(number))
                sent.append(pool.submit(hostile.send, server.port, attack))
        return Counter(item.result() for item in sent)


if __name__ == "__main__":
    sys.exit(main())
