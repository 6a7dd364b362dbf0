"""How fast and in how little memory generation runs; one JSON line per figure.

    python -m benchmarks.instruct [--seconds 20] [--delay 0.2] [--captions 1000 20000]
    python -m benchmarks.instruct --seconds 0 --captions 1000 20000 200000    # memory alone

* throughput: captions answered by a local endpoint that waits 200 ms, 32 in flight; the ceiling
  is 160 a second. `sustained` is the endpoint's own count, from its first reply to its last;
  `whole_run` counts reading the captions and writing the output as well.
* processor time of a request: of our process, all of a run divided by its captions.
* memory: this process's peak for each number of captions, against an endpoint that does not wait;
  flat means that captions and replies stream through.
The endpoint runs in a process of its own.
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
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MEASURE = "--measure"
IN_FLIGHT = 32


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


def measure(captions: str, out: str, endpoint: str) -> None:
    """Generate once, in a process of its own, and print what it took."""
    from clover.instruct.generate import GenerateSettings, generate_file

    # The first request pays for imports; a long run does not notice them.
    warm_up, warm = start_endpoint(0.0)
    try:
        settings = GenerateSettings(endpoint=warm, model="m", limit=1)
        generate_file(Path(captions), out=Path(f"{out}.warm"), settings=settings)
    finally:
        warm_up.terminate()
    settings = GenerateSettings(endpoint=endpoint, model="m", concurrency=IN_FLIGHT)
    start, cpu = time.perf_counter(), time.process_time()
    summary = generate_file(Path(captions), out=Path(out), settings=settings)
    found = {
        "done": summary.done,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(found))


def generate(count: int, *, delay: float) -> dict[str, float]:
    """Run `measure` on so many captions; add what the endpoint counted."""
    process, endpoint = start_endpoint(delay)
    try:
        with tempfile.TemporaryDirectory() as name:
            source = write_captions(Path(name) / "captions.jsonl", count)
            command = [sys.executable, "-m", "benchmarks.instruct", MEASURE, str(source)]
            command += [str(Path(name) / "out.jsonl"), endpoint]
            done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        with urllib.request.urlopen(endpoint.removesuffix("/v1") + "/count") as answer:
            counted = json.load(answer)
        assert counted["replies"] == found["done"] == count, (counted, found)
        return {**found, "endpoint_seconds": counted["seconds"]}
    finally:
        process.terminate()


def start_endpoint(delay: float) -> tuple[subprocess.Popen[str], str]:
    """Start the endpoint in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.endpoint", "--delay", str(delay)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, f"http://127.0.0.1:{int(process.stdout.readline())}/v1"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="throughput run; 0 for none")
    parser.add_argument("--delay", type=float, default=0.2, help="seconds before each reply")
    parser.add_argument("--captions", type=int, nargs="*", default=[1000, 20_000], help="memory")
    options = parser.parse_args()
    if options.seconds:
        throughput(options.seconds, options.delay)
    if options.captions:
        memory(options.captions)


def throughput(seconds: float, delay: float) -> None:
    """Measure requests a second and processor time a request."""
    ceiling = IN_FLIGHT / delay
    found = generate(int(seconds * ceiling), delay=delay)
    count, load = found["done"], os.getloadavg()[0]
    sustained = (count - 1) / found["endpoint_seconds"]
    show("requests_per_second_sustained", sustained, goal=0.95 * ceiling, load=load)
    show("requests_per_second_whole_run", count / found["seconds"])
    show("cpu_ms_per_request", 1000 * found["cpu_seconds"] / count)


def memory(counts: list[int]) -> None:
    """Measure the peak for each number of captions."""
    peaks = {}
    for count in counts:
        found = generate(count, delay=0.0)
        peaks[count] = found["peak_mib"]
        rate = count / found["seconds"]
        show(f"peak_mib_{count}_captions", peaks[count], requests_per_second=rate)
    show("peak_growth_mib", peaks[max(counts)] - peaks[min(counts)])


def show(name: str, value: float, **more: float) -> None:
    """Print one figure as a JSON line."""
    rounded = {key: round(number, 2) for key, number in more.items()}
    print(
        json.dumps({"benchmark": "instruct", "figure": name, "value": round(value, 2), **rounded}),
        flush=True,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == [MEASURE]:
        measure(*sys.argv[2:])
    else:
        main()
