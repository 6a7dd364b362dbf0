"""Scoring protocols: one file a family, one table of names."""

from __future__ import annotations

from collections.abc import Sequence

from clover.core.errors import CloverError, nearest
from clover.evaluate.protocol.base import DROPPED, METRICS, Item, Protocol, Rating
from clover.evaluate.protocol.llava_med import LLAVA_MED, LLAVA_MED_BATCH, LLAVA_MED_PVQA
from clover.evaluate.protocol.pathvqa import PATHVQA
from clover.evaluate.protocol.quilt import QUILT
from clover.evaluate.protocol.strict import STRICT

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (STRICT, LLAVA_MED, LLAVA_MED_BATCH, LLAVA_MED_PVQA, QUILT, PATHVQA)
}

__all__ = ["DROPPED", "METRICS", "PROTOCOLS", "Item", "Protocol", "Rating", "find_protocols"]


def find_protocols(names: str | Sequence[str]) -> list[Protocol]:
    """Return the protocols of a comma-separated list, or of a list, each once.

    Raises:
        CloverError: an unknown name, or none.
    """
    listed = names.split(",") if isinstance(names, str) else list(names)
    wanted = list(dict.fromkeys(name.strip() for name in listed if name.strip()))
    if not wanted:
        raise CloverError(f"no protocol named; known: {', '.join(PROTOCOLS)}")
    for name in wanted:
        if name not in PROTOCOLS:
            raise CloverError(f"no protocol '{name}'{nearest(name, PROTOCOLS)}")
    return [PROTOCOLS[name] for name in wanted]
