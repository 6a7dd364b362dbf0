"""A finished training that another one takes the place of is kept, not written over."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from clover.core.files import sha256_file

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Earlier:
    """What a training of other settings or other data left where this one will write.

    Attributes:
        files: Its files, the one that says what it is last.
        folder: Where they go when this training is done.
    """

    files: tuple[Path, ...]
    folder: Path

    @classmethod
    def of(cls, note: Path, *others: Path, folder: Path) -> Earlier | None:
        """Return it where there is one, and say where it will be.

        Args:
            note: The file that says what a finished training was made from, written last.
            others: The rest of it; they may be absent.
            folder: Where earlier trainings are kept; each has a folder of its own there.
        """
        if not note.exists():
            return None
        found = cls((*others, note), folder / sha256_file(note)[:8])
        _LOG.warning(
            "%s was made with other settings or data; when this training is done, it will be kept "
            "in %s",
            next((path for path in found.files if path.exists()), note),
            found.folder,
        )
        return found

    def keep(self) -> None:
        """Move the files away; stopped in between, the next call moves the rest."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.files:
            if path.exists():
                path.replace(self.folder / path.name)
