"""How fast and in how little memory generation runs; one JSON line per figure.

    python -m benchmarks.instruct [--seconds 12] [--large 20000] [--delay 0.2]

* throughput: captions answered a second by a local endpoint that waits 200 ms, 32 in flight;
  the ceiling is 160 a second.
* memory: this process's peak for a small and for a large caption file; flat means that captions
  and replies stream through.
The endpoint runs in a process of its own, on the same cores.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MEASURE = "--measure"


def write_captions(path: Path, count: int) -> Path:
    """Write so many different captions of ordinary length."""
    with path.open("w", encoding="utf-8") as out:
        for number in range(count):
            text = (
                f"Section {number} of colonic mucosa with branched crypts, reduced goblet cells "
                "and a dense infiltrate of lymphocytes and plasma cells in the lamina propria."
            )
            out.write(json.dumps({"image": f"{number}.png", "caption": text}) + "\n")
    return path


def measure(captions: str, out: str, endpoint: str, concurrency: str) -> None:
    """Generate once, in a process of its own, and print what it took."""
    from clover.instruct.generate import GenerateSettings, generate_file

    settings = GenerateSettings(endpoint=endpoint, model="m", concurrency=int(concurrency))
    # The first request pays for imports; a long run does not notice them.
    warm = GenerateSettings(endpoint=endpoint, model="m", limit=1)
    generate_file(Path(captions), out=Path(f"{out}.warm"), settings=warm)
    start, cpu = time.perf_counter(), time.process_time()
    summary = generate_file(Path(captions), out=Path(out), settings=settings)
    found = {
        "done": summary.done,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(found))


def generate(folder: Path, *, count: int, endpoint: str, concurrency: int) -> dict[str, float]:
    """Run `measure` on so many captions."""
    source = write_captions(folder / f"captions-{count}.jsonl", count)
    command = [sys.executable, "-m", "benchmarks.instruct", MEASURE, str(source)]
    command += [str(folder / f"out-{count}-{concurrency}.jsonl"), endpoint, str(concurrency)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def start_endpoint(delay: float) -> tuple[subprocess.Popen[str], str]:
    """Start the tests' endpoint in a process of its own."""
    program = ROOT / "tests" / "instruct" / "endpoint.py"
    process = subprocess.Popen(
        [sys.executable, str(program), "--delay", str(delay)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, f"http://127.0.0.1:{int(process.stdout.readline())}/v1"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--seconds", type=float, default=12.0, help="of the throughput run")
    parser.add_argument("--small", type=int, default=1000)
    parser.add_argument("--large", type=int, default=20_000)
    parser.add_argument("--delay", type=float, default=0.2)
    options = parser.parse_args()
    ceiling = 32 / options.delay
    with tempfile.TemporaryDirectory() as name:
        process, endpoint = start_endpoint(options.delay)
        try:
            count = int(options.seconds * ceiling)
            found = generate(Path(name), count=count, endpoint=endpoint, concurrency=32)
        finally:
            process.terminate()
        rate = found["done"] / found["seconds"]
        show("requests_per_second", rate, goal=0.95 * ceiling, load=os.getloadavg()[0])
        show("cpu_ms_per_request", 1000 * found["cpu_seconds"] / found["done"])
        process, endpoint = start_endpoint(0.0)
        try:
            peaks = {
                count: generate(Path(name), count=count, endpoint=endpoint, concurrency=32)
                for count in (options.small, options.large)
            }
        finally:
            process.terminate()
        for count, found in peaks.items():
            show(f"peak_mib_{count}_captions", found["peak_mib"])
        growth = peaks[options.large]["peak_mib"] - peaks[options.small]["peak_mib"]
        show("peak_growth_mib", growth)


def show(name: str, value: float, **more: float) -> None:
    """Print one figure as a JSON line."""
    rounded = {key: round(number, 2) for key, number in more.items()}
    print(
        json.dumps({"benchmark": "instruct", "figure": name, "value": round(value, 2), **rounded})
    )


if __name__ == "__main__":
    if sys.argv[1:2] == [MEASURE]:
        measure(*sys.argv[2:])
    else:
        main()
