"""Encoders known by name: `encoder.kind: known`, `encoder.model: uni2-h` is all a recipe says.

What the register (`known.yaml`) states is put where the recipe is silent.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from clover.core.config import EncoderConfig
from clover.core.errors import CloverError, nearest

_REGISTER = Path(__file__).with_name("known.yaml")


@cache
def register() -> dict[str, dict[str, Any]]:
    """Return every known encoder by name, as the YAML states it."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(_REGISTER.read_text(encoding="utf-8"))
    return found


def expand(config: EncoderConfig) -> EncoderConfig:
    """Return the configuration with the register's entry in the places the recipe left empty.

    Raises:
        CloverError: no such entry.
    """
    entry = register().get(config.model)
    if entry is None:
        raise CloverError(
            f"encoder.model '{config.model}' is not in the register"
            f"{nearest(config.model, register())}"
        )
    given = config.model_fields_set - {"kind", "model"}
    stated = {name: entry.get(name) for name in EncoderConfig.model_fields if name not in given}
    kept = {name: value for name, value in stated.items() if value is not None}
    return EncoderConfig.model_validate(config.model_dump(exclude_unset=True) | kept)
