"""The phantom's words: `language.yaml`, read once."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml


@cache
def language() -> dict[str, Any]:
    """Return the word lists and sentence forms of captions and questions."""
    text = Path(__file__).with_name("language.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def pick(rng: np.random.Generator, choices: list[str]) -> str:
    """Return one of the choices, drawn evenly."""
    return choices[rng.integers(len(choices))]


def listed(words: list[str], joint: str) -> str:
    """Return ``a``, ``a and b`` or ``a, b and c``, joined by `joint`."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {joint} {words[-1]}"


def capitalised(text: str) -> str:
    """Return the text with a capital first letter and the rest as it is."""
    return text[:1].upper() + text[1:]
