"""What a stage learns from: settings, data and images, told apart by name when they differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clover.core.config import Recipe
from clover.core.files import fingerprint, read_json
from clover.training.device import Device

_FORMAT = "number_format"


@dataclass(frozen=True)
class MadeFrom:
    """All that changes the numbers of a stage.

    Attributes:
        settings: Each by its name: the recipe's, and hashes of data and images.
        number_format: That products run in; `auto` chooses it by the machine.
        is_chosen: Whether the recipe names the format. A finished stage is finished on a machine
            that would have chosen another; an unfinished one goes on only as it began.
    """

    settings: Mapping[str, str]
    number_format: str
    is_chosen: bool

    @classmethod
    def of(
        cls, recipe: Recipe, *sections: str, device: Device, data: Mapping[str, str | None]
    ) -> MadeFrom:
        """Return it for a stage.

        Args:
            recipe: Of the stage.
            sections: Those of the recipe that matter to it.
            device: Where it is trained.
            data: Hashes and counts by what they are called.
        """
        settings = recipe.settings(*sections) | {name: str(value) for name, value in data.items()}
        number_format = str(device.dtype).removeprefix("torch.")
        return cls(settings, number_format, recipe.precision != "auto")

    @property
    def key(self) -> str:
        """Short hash of all but the number format."""
        return fingerprint(dict(self.settings))

    @property
    def resume_key(self) -> str:
        """Short hash of all, the number format too."""
        return fingerprint(self.resume_settings())

    def resume_settings(self) -> dict[str, str]:
        """Return what `resume_key` is made of, by name."""
        return {**self.settings, "the number format": self.number_format}

    def note(self) -> dict[str, str]:
        """Return what a finished stage states of itself."""
        return {"key": self.key, _FORMAT: self.number_format}

    def is_that_of(self, note: Path) -> bool:
        """Return whether a finished stage's file states just this."""
        if not note.exists():
            return False
        found: dict[str, Any] = read_json(note)
        is_same_format = not self.is_chosen or found.get(_FORMAT) == self.number_format
        return found.get("key") == self.key and is_same_format
