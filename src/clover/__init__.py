"""CLOVER: from captions of pathology images to a model you can talk to about an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clover.core.errors import CloverError as CloverError
    from clover.evaluate.score import score as score
    from clover.model import Answer as Answer
    from clover.model import Clover as Clover
    from clover.model import load as load
    from clover.qformer.model import QFormer as QFormer

__version__ = "0.1.0"
__all__ = ["Answer", "Clover", "CloverError", "QFormer", "load", "score"]

_LAZY = {
    "Answer": "clover.model",
    "Clover": "clover.model",
    "CloverError": "clover.core.errors",
    "QFormer": "clover.qformer.model",
    "load": "clover.model",
    "score": "clover.evaluate.score",
}


if not TYPE_CHECKING:  # it would tell a checker that there is every name

    def __getattr__(name: str) -> object:
        # Lazy, so that `import clover` costs nothing and the scorer never needs torch.
        if name in _LAZY:
            import importlib

            return getattr(importlib.import_module(_LAZY[name]), name)
        raise AttributeError(f"module 'clover' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
