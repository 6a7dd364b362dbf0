"""Images of one file that are in another: the same bytes, or the same picture turned or cropped.

In: two record files. The second one's portraits stay in memory (about 9 KB an image), the first
one's pass by: name the smaller file second.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clover.core.record import Rejection
from clover.core.terminal import progress
from clover.data.likeness import ANGLES, RINGS, Floats, Gallery
from clover.data.pictures import Picture, look


@dataclass(frozen=True)
class Leak:
    """An image of one file that is in the other."""

    image: str
    other: str
    likeness: float | None
    """None where the bytes are the same."""

    def how(self) -> str:
        """Return ``same bytes`` or ``alike 0.83``."""
        return "same bytes" if self.likeness is None else f"alike {self.likeness:.2f}"

    def row(self, path: Path) -> dict[str, Any]:
        """Return the JSON-able form for the written list."""
        content = {"image": self.image, "other": self.other, "how": self.how()}
        return Rejection(str(path), 0, "leak", content).row()


class Reference:
    """The images of the second file, to compare with."""

    def __init__(self, names: Iterable[str], folder: Path) -> None:
        """Open every image; what is missing or broken is counted in `num_unreadable`."""
        self.num_unreadable = 0
        self.num_images = 0
        self._by_digest: dict[str, str] = {}
        self._names: list[str] = []
        portraits: list[Floats] = []
        with progress("second file", None) as advance:
            for name in names:
                found = look(folder / name, with_portrait=True)
                advance()
                self.num_images += 1
                if found.problem is not None:
                    self.num_unreadable += 1
                elif found.digest:
                    self._by_digest.setdefault(found.digest, name)
                    if found.portrait is not None:
                        self._names.append(name)
                        portraits.append(found.portrait)
        stacked = np.stack(portraits) if portraits else np.zeros((0, RINGS, ANGLES), np.float32)
        self._gallery = Gallery(stacked) if portraits else None

    def leaks(self, name: str, picture: Picture) -> list[Leak]:
        """Return the images here that are the same as one of the first file."""
        if picture.digest in self._by_digest and picture.digest:
            return [Leak(name, self._by_digest[picture.digest], None)]
        if picture.portrait is None or self._gallery is None:
            return []
        alike = self._gallery.alike(picture.portrait)
        return [
            Leak(name, self._names[place], value)
            for place, value in sorted(alike, key=lambda item: -item[1])
        ]
