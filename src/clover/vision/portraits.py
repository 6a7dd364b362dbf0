"""Portraits of images by hash, in a folder that several processes fill.

In: images by hash. Out: their portraits [R, A]. Each piece's worth is written as one part: what a
killed process had not written yet is looked at again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from clover.core.decoding import BROKEN, UNSCALED
from clover.core.files import atomic_path, fingerprint
from clover.vision.likeness import Floats
from clover.vision.pictures import Picture, look

Halves = NDArray[np.float16]
PIECE = 4096
"""Images a part: some seconds of work, and 8 MB."""
_NONE = np.zeros(0, np.float16)
"""Stands for the portrait of bytes that are no picture: they are not looked at again."""


def pieces(digests: Sequence[str]) -> list[Sequence[str]]:
    """Cut hashes into a part's worth each; every process that has the same ones cuts alike."""
    return [digests[start : start + PIECE] for start in range(0, len(digests), PIECE)]


def decoders() -> ThreadPoolExecutor:
    """Return the threads that images are opened in, for portraits as for features."""
    return ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1))


class Portraits:
    """Portraits of images; those that are not in the folder yet are made.

    Args:
        folder: Where parts lie; made when absent.
        images: SHA-256 -> path.
    """

    def __init__(self, folder: Path, images: Mapping[str, Path]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._images = folder, images
        self._parts: dict[str, Path] = {}
        self._seen: set[Path] = set()
        self.refresh()

    def refresh(self) -> None:
        """Take up what other processes have written."""
        for part in sorted(set(self._folder.glob("part-*.safetensors")) - self._seen):
            self._seen.add(part)
            try:
                with safe_open(part, "numpy") as opened:
                    self._parts |= {key: part for key in opened.keys() if key in self._images}  # noqa: SIM118
            except (SafetensorError, OSError):
                continue  # cut off: its images are looked at again

    def missing(self, digests: Sequence[str]) -> list[str]:
        """Return those that are not in the folder."""
        return [digest for digest in digests if digest not in self._parts]

    def each(
        self, digests: Sequence[str], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[str, Floats | None]]:
        """Yield the portraits [R, A] of a piece, or None of what cannot be read; then save it.

        Args:
            digests: A piece.
            pool: Opens images ahead of whoever reads the portraits.
        """
        self.refresh()
        missing = self.missing(digests)
        for digest, found in self._kept(digests).items():
            yield digest, found.astype(np.float32) if found.size else None
        made: dict[str, Halves] = {}
        looked = pool.map(self._look, missing)
        for digest, picture in zip(missing, looked, strict=True):
            if picture.portrait is not None:
                made[digest] = picture.portrait.astype(np.float16)
            elif picture.problem in (BROKEN, UNSCALED):
                made[digest] = _NONE
            yield digest, None if picture.portrait is None else made[digest].astype(np.float32)
        if made:
            self._save(made)

    def _look(self, digest: str) -> Picture:
        return look(self._images[digest], with_portrait=True)

    def _kept(self, digests: Sequence[str]) -> dict[str, Halves]:
        """Return what is in the folder, each part opened once."""
        by_part: dict[Path, list[str]] = {}
        for digest in digests:
            if digest in self._parts:
                by_part.setdefault(self._parts[digest], []).append(digest)
        found: dict[str, Halves] = {}
        for part, named in by_part.items():
            with safe_open(part, "numpy") as opened:
                found |= {digest: opened.get_tensor(digest) for digest in named}
        return {digest: found[digest] for digest in digests if digest in found}

    def _save(self, made: Mapping[str, Halves]) -> None:
        name = self._folder / f"part-{fingerprint(sorted(made))}.safetensors"
        with atomic_path(name) as partial:
            save_file(dict(made), partial)
        self._seen.add(name)
        self._parts |= dict.fromkeys(made, name)
