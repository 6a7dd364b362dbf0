"""The type of an option that is a number: NaN is within every limit to Python, and is none here."""

from __future__ import annotations

import math
from typing import Any

import click


class FiniteFloat(click.FloatRange):
    """A float within a range, neither NaN nor infinite."""

    name = "float"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number; a usage error otherwise."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{number:g} is not a finite number.", param, ctx)
        return number


POSITIVE = FiniteFloat(0, min_open=True)
NOT_NEGATIVE = FiniteFloat(0)
