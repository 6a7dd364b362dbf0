"""Convert a checkpoint and say what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clover.convert.checkpoint import Checkpoint
from clover.convert.read import read_checkpoint, with_parts
from clover.convert.verify import Parity, verify
from clover.convert.write import write_clover, write_lavis, write_transformers


@dataclass(frozen=True)
class Conversion:
    """What was written, what was not, and how far both are apart.

    Attributes:
        source: What was read, with what was left out and filled.
        written: The file or folder.
        parity: The comparison; None where it was not asked for.
    """

    source: Checkpoint
    written: Path
    parity: Parity | None


def convert(
    source: Path,
    target: Path,
    *,
    to: str,
    encoder: Path | None = None,
    language: Path | None = None,
    num_heads: int | None = None,
    has_check: bool = True,
) -> Conversion:
    """Convert `source` to the form `to` at `target`.

    Args:
        source: A file or folder.
        target: A folder, or for LAVIS a file.
        to: `clover`, `lavis` or `transformers`.
        encoder: EVA's weights, where the source has none and the target needs them.
        language: The language model's folder, likewise.
        num_heads: The Q-Former's heads, where the source cannot say them.
        has_check: Whether the same random input goes through both afterwards.

    Raises:
        CloverError: the source is damaged, of no known form, or lacks what the target needs.
    """
    found = read_checkpoint(source)
    with_parts(found, encoder=encoder, language=language)
    if num_heads is not None:
        found.details["num_heads"] = num_heads
    if to == "clover":
        written = write_clover(found, target)
    elif to == "lavis":
        written = write_lavis(found, target)
    else:
        written = write_transformers(found, target)
    parity = verify(found, read_checkpoint(written)) if has_check else None
    return Conversion(found, written, parity)
