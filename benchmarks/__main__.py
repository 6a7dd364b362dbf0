"""Run the benchmarks that need no arguments: `python -m benchmarks` or `make bench`."""

from __future__ import annotations

import subprocess
import sys

QUICK = ("benchmarks.phantom", "benchmarks.step", "benchmarks.ask", "benchmarks.score")

if __name__ == "__main__":
    codes = [subprocess.run([sys.executable, "-m", name], check=False).returncode for name in QUICK]
    sys.exit(max(codes))
