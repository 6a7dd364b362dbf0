"""The one exception a user may see, and the hint that names the nearest fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CloverError(Exception):
    """A user's mistake: one line that names the value, the limit and the nearest fix.

    The command line prints the message and exits with code 2. Programmers' mistakes are
    `assert`s and stay loud.
    """


def nearest(value: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the nearest known word, or the list of known words."""
    words = sorted(set(known))
    close = difflib.get_close_matches(value, words, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(words)}" if words else ""
