"""The templates of this room, and how they are filled."""

from __future__ import annotations

from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined


def fill(name: str, /, **values: Any) -> str:
    """Return a template with its values; everything is escaped, and a missing value is an error."""
    environment = Environment(
        loader=ChoiceLoader(
            [PackageLoader("clover.report", "."), PackageLoader("clover.core", ".")]
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(**values)
