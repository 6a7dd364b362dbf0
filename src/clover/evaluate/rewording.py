"""The same question in other words: does the answer hang on how it is asked?"""

from __future__ import annotations

import re
import zlib
from functools import cache
from pathlib import Path

import yaml

_FILE = Path(__file__).with_suffix(".yaml")


@cache
def _patterns() -> list[tuple[re.Pattern[str], list[str]]]:
    rules = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    return [(re.compile(rule["pattern"], re.IGNORECASE), rule["wordings"]) for rule in rules]


def reworded(question: str) -> str | None:
    """Return a question in other words, or None where no rule knows how.

    The first rule that fits is taken. Which of its wordings, hangs on the question alone; never
    the question itself.
    """
    plain = " ".join(question.split()).rstrip("?").rstrip()
    for pattern, wordings in _patterns():
        found = pattern.fullmatch(plain)
        if found is None:
            continue
        start = zlib.crc32(plain.lower().encode()) % len(wordings)
        for place in range(len(wordings)):
            made = wordings[(start + place) % len(wordings)].format(*found.groups())
            if made.rstrip("?").lower() != plain.lower():
                return made
        return None
    return None
