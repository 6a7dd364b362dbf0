"""Numbers as a person reads them; what is not a number is a dash."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DASH = "–"


def number(value: Any) -> float | None:
    """Return a finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


@dataclass(frozen=True)
class Figure:
    """A value with its 95 % interval, where there is one."""

    value: float | None
    low: float | None = None
    high: float | None = None
    count: int | None = None

    @classmethod
    def read(cls, found: Any) -> Figure:
        """Read ``{"value": …, "low": …, "high": …, "n": …}`` or a bare number."""
        if not isinstance(found, Mapping):
            return cls(number(found))
        count = number(found.get("n"))
        return cls(
            number(found.get("value")),
            number(found.get("low")),
            number(found.get("high")),
            None if count is None else int(count),
        )

    @property
    def text(self) -> str:
        """The value with one decimal, or a dash."""
        return decimal(self.value)

    @property
    def interval(self) -> str:
        """The interval as ``90.1 to 95.8``, or nothing."""
        if self.value is None or self.low is None or self.high is None:
            return ""
        return f"{decimal(self.low)} to {decimal(self.high)}"

    @property
    def signed(self) -> str:
        """The value with its sign: a difference in points."""
        return signed(self.value)


def decimal(value: Any, digits: int = 1) -> str:
    """Return a number with so many decimals, a true minus, and thousands apart."""
    found = number(value)
    if found is None:
        return DASH
    text = f"{found:,.{digits}f}"
    if not text.strip("-0.,"):
        text = text.lstrip("-")
    return text.replace("-", "−")


def signed(value: Any, digits: int = 1) -> str:
    """Return a number with its sign, also the plus."""
    text = decimal(value, digits)
    return f"+{text}" if (number(value) or 0) > 0 and text.strip("0.") else text


def duration(seconds: Any) -> str:
    """Return ``48.3 s``, ``8 min 12 s`` or ``3 h 05 min``."""
    found = number(seconds)
    if found is None:
        return DASH
    if found < 60:
        return f"{found:.1f} s"
    minutes, rest = divmod(round(found), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def dollars(amount: Any) -> str:
    """Return ``$0``, ``$0.0042`` or ``$12.30``."""
    found = number(amount)
    if found is None:
        return DASH
    if found == 0:
        return "$0"
    return f"${found:,.2f}" if found >= 0.1 else f"${found:.2g}" if found >= 1e-4 else "<$0.0001"


def parameters(count: Any) -> str:
    """Return ``9.41 M`` for 9,412,224."""
    found = number(count)
    if found is None:
        return DASH
    if found >= 1e9:
        return f"{found / 1e9:.2f} B"
    return f"{found / 1e6:.2f} M" if found >= 1e4 else f"{found:,.0f}"


def words(text: Any) -> int:
    """Return the number of words of a text."""
    return len(text.split()) if isinstance(text, str) else 0
