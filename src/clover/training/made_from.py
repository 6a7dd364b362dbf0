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
    earlier_key: str
    """By which finished stages were known before images and number formats were told apart."""

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        *sections: str,
        device: Device,
        files: Mapping[str, str | None],
        images: Mapping[str, str],
    ) -> MadeFrom:
        """Return it for a stage.

        Args:
            recipe: Of the stage.
            sections: Those of the recipe that matter to it.
            device: Where it is trained.
            files: Hashes of the files it reads, by what they are called.
            images: What tells its images from others, likewise.
        """
        named = {name: str(value) for name, value in {**files, **images}.items()}
        settings = recipe.settings(*sections) | named
        earlier = fingerprint([recipe.fingerprint("precision", *sections), *files.values()])
        number_format = str(device.dtype).removeprefix("torch.")
        return cls(settings, number_format, recipe.precision != "auto", earlier)

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
        if _FORMAT not in found:
            return found.get("key") == self.earlier_key
        is_same_format = not self.is_chosen or found.get(_FORMAT) == self.number_format
        return found.get("key") == self.key and is_same_format
