"""Images a second of the phantom, drawing and PNG writing, on one core."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.figure import print_figure
from clover.phantom.write import make_phantom

IMAGES = 150


def main() -> None:
    """Print images per second of processor time and of the clock."""
    with tempfile.TemporaryDirectory() as folder:
        make_phantom(Path(folder) / "warm", images=8, seed=1)
        clock, processor = time.perf_counter(), time.process_time()
        make_phantom(Path(folder) / "set", images=IMAGES, seed=0)
        clock, processor = time.perf_counter() - clock, time.process_time() - processor
    print_figure("phantom, by processor time", IMAGES / processor, "images/s")
    print_figure("phantom, by the clock", IMAGES / clock, "images/s")


if __name__ == "__main__":
    main()
