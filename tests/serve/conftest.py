"""The slide and its other scans, which `tests/slides` makes."""

from __future__ import annotations

from tests.slides.conftest import pixels, scans, svs

__all__ = ["pixels", "scans", "svs"]
