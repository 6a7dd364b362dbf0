"""Images by their hashes, for tests that fill a cache without records in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clover.core.record import Record, Rejection
from clover.vision.hashes import Digests, ImageHashes


def hash_images(
    records: Sequence[Record], folder: Path
) -> tuple[dict[str, str], dict[str, Path], list[Rejection]]:
    """Hash the images of a few records.

    Returns:
        image name -> SHA-256; SHA-256 -> one path with these bytes; missing images, and regions
        that name no place.
    """
    names = list(dict.fromkeys(str(record.image) for record in records if record.image is not None))
    hashes = ImageHashes(folder)
    hashes.add(names)
    values, is_there = hashes.values()
    digests = {
        name: digest
        for name, digest, there in zip(names, Digests(values), is_there, strict=True)
        if there
    }
    paths: dict[str, Path] = {}
    for name, digest in digests.items():
        paths.setdefault(digest, folder / name)
    return digests, paths, hashes.rejected
