"""This room's YAML files, and their lists of words as regexes of whole words."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parent


@functools.cache
def load_yaml(name: str) -> Any:
    """Return one of this room's YAML files, by its path without the ending."""
    # The C loader is as safe and nine times as fast; every command reads these lists.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"), Loader=loader)


def word_pattern(variants: Iterable[str]) -> str:
    """Return a regex of whole words, the longest first; spaces match any white space."""
    words = sorted(set(variants), key=lambda word: (-len(word), word))
    body = "|".join(re.escape(word).replace(r"\ ", r"\s+") for word in words)
    return rf"(?<![\w-])(?:{body})"


def phrase_pattern(variants: Iterable[str]) -> re.Pattern[str]:
    """Return words and phrases as one regex of whole words, in any case."""
    return re.compile(word_pattern(variants) + r"(?!\w)", re.IGNORECASE)


@functools.cache
def words(name: str) -> re.Pattern[str]:
    """Return a list of `dictionary/language.yaml` as one regex of whole words."""
    return phrase_pattern(load_yaml("dictionary/language")[name])
