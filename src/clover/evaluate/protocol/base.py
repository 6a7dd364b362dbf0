"""What a protocol is: a name, a version, and a rule that rates one item."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

DROPPED: Final = -1.0
"""The closed rating of an item that a rule leaves out of numerator and denominator alike."""

METRICS: Final = ("closed", "recall", "precision", "f1", "exact")
"""The ratings of an item, in the order of `Rating`."""


class Item(NamedTuple):
    """One prediction beside its truth."""

    id: Any
    question: str
    answer: str
    is_closed: bool
    prediction: str
    yes_no_answer: str | None = None
    image: str | None = None
    form: str | None = None


class Rating(NamedTuple):
    """What a rule says of one item: fractions, None where it says nothing."""

    closed: float | None = None
    recall: float | None = None
    precision: float | None = None
    f1: float | None = None
    exact: float | None = None
    label: str | None = None
    """How the prediction was read: yes, no, or None when it could not be read (closed items)."""


@dataclass(frozen=True)
class Protocol:
    """A named, versioned scoring rule."""

    name: str
    version: str
    rate: Callable[[Item], Rating]
    extras: Callable[[Item], dict[str, float | None]] | None = None
    """Further figures of one item, such as BLEU; computed only when asked for."""
    warning: str | None = None
