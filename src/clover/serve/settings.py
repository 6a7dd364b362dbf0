"""What a server allows: where it listens, who may ask, and how much.

Every limit is here once; the start of `clover serve` prints them, and errors name them.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from clover.core.errors import CloverError

_MIB = 2**20


@dataclass(frozen=True)
class ServeSettings:
    """Where and how much."""

    host: str = "127.0.0.1"
    """Address to listen at."""
    port: int = 8000
    """0 takes a free one."""
    token: str | None = None
    """What clients must send as `Authorization: Bearer`; required off loopback."""
    hosts: tuple[str, ...] = ()
    """Further names that a `Host` header may carry, for a server behind a name."""
    allow_image_urls: bool = False
    """Whether http(s) image addresses are fetched; public addresses only."""
    max_body_bytes: int = 20 * _MIB
    """Longest request."""
    max_pixels: int = 50_000_000
    """Largest image, read from its header before anything is decoded."""
    max_batch: int = 16
    """Answers written at the same time."""
    max_waiting: int = 64
    """Requests that wait for a place; one more is refused with 429."""
    max_tokens: int = 1024
    """Longest answer that may be asked for."""
    body_seconds: float = 15.0
    """In which a whole request must have arrived."""
    answer_seconds: float = 300.0
    """In which a whole answer must have been written, waiting included."""
    drain_seconds: float = 30.0
    """What running answers get after SIGTERM."""
    language_endpoint: str | None = None
    """Base URL of a vLLM server that writes the answers from prompt embeddings."""
    language_key: str | None = None
    """What it wants as its API key."""
    feature_bytes: int = 256 * _MIB
    """Image features kept for further questions."""
    row_bytes: int = 4096 * _MIB
    """Keys and values of the answers being written; a long one waits until there is room."""
    max_text: int = 200_000
    """Characters of a conversation."""
    prefix_bytes: int = 256 * _MIB
    """Keys and values kept of prompts that may come again."""

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and not self.token:
            raise CloverError(
                f"--host {self.host} can be reached from other machines, so a token is required: "
                "set CLOVER_TOKEN to a secret, or listen at 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Return whether an address or name means this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
