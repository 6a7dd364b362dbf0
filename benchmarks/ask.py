"""Seconds of one answer after loading, of loading, and of `clover --help`.

python -m benchmarks.ask clover-demo/model image.png
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import clover
from benchmarks.figure import print_figure, seconds


def main(arguments: list[str]) -> int:
    """Print the figures; the demo's model and first image are the default."""
    folder, image = arguments or [
        "clover-demo/model",
        "clover-demo/phantom-validation/images/00000.png",
    ]
    command = [sys.executable, "-m", "clover.cli", "--help"]
    print_figure(
        "clover --help", seconds(lambda: subprocess.run(command, capture_output=True)), "s"
    )
    if not Path(folder).exists():
        print(f"no {folder}: run `make demo` first, or name a model and an image", file=sys.stderr)
        return 2
    start = time.perf_counter()
    model = clover.load(folder)
    print_figure("clover.load", time.perf_counter() - start, "s")
    print_figure("one answer", seconds(lambda: model.ask(image, "Is there necrosis?")), "s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
