"""CLOVER: from captions of pathology images to a model you can talk to about an image."""

from __future__ import annotations

from typing import Any

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


def __getattr__(name: str) -> Any:
    # Lazy, so that `import clover` costs nothing and the scorer never needs torch.
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'clover' has no attribute '{name}'")
