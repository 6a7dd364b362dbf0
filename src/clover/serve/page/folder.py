"""The one folder whose slides a server shows: no file outside it, whatever is asked for."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from clover.core.errors import CloverError
from clover.slides.reader import Slide, open_slide
from clover.slides.source import PLAIN_SUFFIXES, SLIDE_SUFFIXES
from clover.slides.units import parse_microns_per_pixel

_SUFFIXES = SLIDE_SUFFIXES | PLAIN_SUFFIXES
_KEPT_OPEN = 8
_MOST_LISTED = 5000


class SlideFolder:
    """Slides under one folder, by their path in it.

    Args:
        root: The folder of `clover serve --slides DIR`.

    Raises:
        CloverError: no such folder.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise CloverError(f"--slides {root} is no folder; name one that holds slides")
        self._root = root.resolve()
        self._open: OrderedDict[tuple[Path, int], Slide] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def root(self) -> Path:
        """The folder, links followed."""
        return self._root

    def names(self) -> list[dict[str, Any]]:
        """Return every slide and image of the folder: name, its path here, and bytes."""
        rows = []
        for folder, folders, files in os.walk(self._root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for file in sorted(files):
                path = Path(folder, file)
                if path.suffix.lower() in _SUFFIXES and not file.startswith("."):
                    name = path.relative_to(self._root).as_posix()
                    if self._is_inside(path):
                        rows.append({"name": name, "bytes": path.stat().st_size})
            if len(rows) >= _MOST_LISTED:
                break
        return rows[:_MOST_LISTED]

    def _is_inside(self, path: Path) -> bool:
        """Return whether a file lies in the folder, also once links are followed."""
        try:
            found = path.resolve(strict=True)
        except (OSError, RuntimeError, ValueError):
            return False
        return found.is_relative_to(self._root) and found.is_file()

    def path(self, name: str) -> Path:
        """Return a slide's path.

        Raises:
            CloverError: no slide of that name in the folder. What lies outside is not told from
                what does not exist.
        """
        refusal = CloverError(f"no slide '{name[:200]}' in the folder that is served")
        parts = name.split("/")
        # Neither an empty part nor one that begins with a dot: no root, no parent, nothing hidden.
        if any(not part or part.startswith(".") or set(part) & {"\x00", "\\"} for part in parts):
            raise refusal
        path = self._root.joinpath(*parts)
        if path.suffix.lower() not in _SUFFIXES or not self._is_inside(path):
            raise refusal
        return path

    def slide(self, name: str, mpp: str | None = None) -> Slide:
        """Return a slide, which stays open for the next tile.

        Args:
            name: Its path in the folder.
            mpp: µm per pixel as the user stated it.

        Raises:
            CloverError: no such slide, a damaged one, or a size of a pixel that is none.
        """
        path = self.path(name)
        stated = parse_microns_per_pixel(mpp) if mpp and mpp != "estimate" else None
        key = (path, path.stat().st_mtime_ns)
        with self._lock:
            if key not in self._open:
                self._open[key] = open_slide(path)
            self._open.move_to_end(key)
            # Not closed here: another thread may be reading a tile of it.
            while len(self._open) > _KEPT_OPEN:
                self._open.popitem(last=False)
            slide = self._open[key]
        return slide.scaled(stated, estimate=mpp == "estimate") if mpp else slide

    def forget(self, slide: Slide) -> None:
        """Open a slide anew the next time: OpenSlide gives nothing more after an error."""
        with self._lock:
            for key in [key for key in self._open if key[0] == slide.path]:
                del self._open[key]
