"""How long scoring a million predictions takes: `python -m benchmarks.score`.

Prints one JSON line: seconds and peak memory of `clover score` over a made-up file of distinct
predictions, three protocols, 1,000 bootstrap draws. It takes every core that it may use, as the
command does; `taskset -c 1` shows one core. Processor seconds include those of further processes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path

TEXT = (
    "the image shows glands with well-differentiated adenocarcinoma, fibrous stroma and scattered "
    "lymphocytes no necrosis is seen in a 3.5 cm mass of colon epithelium nuclei mitotic figures "
    "yes keratin pearls H&E stain chronic inflammation lymph node germinal centre don't normal"
)
WORDS = TEXT.split()


def write_predictions(path: Path, *, count: int, seed: int = 0) -> None:
    """Write `count` predictions, half closed, three questions an image, few texts alike."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as out:
        for number in range(count):
            is_closed = number % 2 == 0
            said = " ".join(rng.choices(WORDS, k=rng.randint(1, 24)))
            row = {
                "id": number,
                "image": f"images/{number // 3}.png",
                "question": "What is shown " + " ".join(rng.choices(WORDS, k=5)) + "?",
                "answer": rng.choice(["yes", "no"])
                if is_closed
                else " ".join(rng.choices(WORDS, k=rng.randint(1, 12))),
                "answer_type": "closed" if is_closed else "open",
                "prediction": rng.choice(["Yes, ", "no. ", ""]) + said,
            }
            out.write(json.dumps(row) + "\n")


def main() -> None:
    """Time one run and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--protocol", default="strict,llava-med,quilt")
    options = parser.parse_args()

    from clover.core.run import peak_memory_gib
    from clover.evaluate.score import num_workers, score_file

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictions.jsonl"
        write_predictions(path, count=options.count)
        workers = num_workers(path)
        start, start_cpu = time.perf_counter(), sum(os.times()[:4])
        score_file(path, options.protocol, draws=options.draws, workers=workers)
        seconds, cpu = time.perf_counter() - start, sum(os.times()[:4]) - start_cpu
    figures = {
        "benchmark": "score",
        "predictions": options.count,
        "protocols": options.protocol,
        "draws": options.draws,
        "workers": workers,
        "seconds": round(seconds, 1),
        "processor_seconds": round(cpu, 1),
        "peak_memory_gib": round(peak_memory_gib(), 2),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
