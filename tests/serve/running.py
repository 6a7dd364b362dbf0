"""A real server in a process of its own, over the tiny model."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.tiny import Tiny, build_tiny, tiny_clover

SOURCE = Path(__file__).resolve().parents[2] / "src"


@dataclass(frozen=True)
class Running:
    """A server's process and where it listens."""

    process: subprocess.Popen[str]
    port: int
    banner: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def resident_bytes(self) -> int:
        text = Path(f"/proc/{self.process.pid}/statm").read_text()
        return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tiny_folder(folder: Path) -> tuple[Tiny, Path]:
    tiny = build_tiny(folder / "parts")
    return tiny, tiny_clover(tiny.recipe).save(folder / "model")


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "CLOVER_TOKEN"}
    return {**kept, "PYTHONPATH": str(SOURCE), "CLOVER_OFFLINE": "1", **more}


@contextlib.contextmanager
def running(*arguments: str, **variables: str) -> Iterator[Running]:
    """Start `clover serve` on a free port; end it with SIGTERM."""
    command = [sys.executable, "-m", "clover.cli", "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(
        [*command, "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(**variables),
    )
    assert process.stdout is not None
    lines: list[str] = []
    try:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("Research use only"):
                break
        banner = "".join(lines)
        found = re.search(r"at http://[^ ]*:(\d+)/v1", banner)
        assert found is not None, banner
        yield Running(process, int(found[1]), banner)
    finally:
        process.terminate()
        process.wait(timeout=60)
        process.stdout.close()


def data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def seen(text: str, *images: str) -> dict[str, object]:
    """Return a user's message with images."""
    parts: list[dict[str, object]] = [{"type": "text", "text": text}]
    parts += [{"type": "image_url", "image_url": {"url": image}} for image in images]
    return {"role": "user", "content": parts}
