"""A checkpoint on its way: tensors under LAVIS's names, read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from clover.core.config import Recipe
from clover.core.tensors import Entry, Place


@dataclass
class Checkpoint:
    """What was found in a source.

    Attributes:
        path: Where it lies.
        form: `lavis`, `transformers` or `clover`.
        entries: LAVIS's name -> tensor. The projection into the language model is `proj`, the
            language model's own tensors begin with `language_model.`.
        left_out: Names in the source that go nowhere, with the reason.
        filled: What the source lacks and CLOVER needs, with the reason.
        language: The language model's configuration as transformers writes it, where there is one.
        language_folder: Where it lies by itself, its tokenizer beside it; None within the source.
        recipe: A CLOVER model's own.
        details: What else the source says: the number of heads, which class it is.
    """

    path: Path
    form: str
    entries: dict[str, Entry] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    filled: dict[str, str] = field(default_factory=dict)
    language: dict[str, Any] | None = None
    language_folder: Path | None = None
    recipe: Recipe | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, place: Place) -> None:
        """Take a tensor as it lies."""
        self.entries[name] = Entry(name, place.dtype, place.shape, place.read)

    def derive(self, name: str, like: Entry | Place, shape: tuple[int, ...], read: Reader) -> None:
        """Take a tensor that is made from others of the same number format."""
        self.entries[name] = Entry(name, like.dtype, shape, read)

    def has(self, prefix: str) -> bool:
        """Return whether any tensor's name begins so."""
        return any(name.startswith(prefix) for name in self.entries)

    def part(self, prefix: str) -> dict[str, Entry]:
        """Return the tensors of a part, under their full names."""
        return {name: item for name, item in self.entries.items() if name.startswith(prefix)}

    @property
    def is_stage_1(self) -> bool:
        """Whether it has the heads of stage 1."""
        return "itm_head.weight" in self.entries


Reader = Callable[[], Tensor]
