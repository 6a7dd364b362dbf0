"""Pickles read as data: lists, dicts, text and numbers; whatever asks for more is refused.

A pickle is a program that may call anything Python can import. The published PathVQA files are
pickles of plain values, so nothing has to be called to read them.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clover.core.errors import CloverError


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """Stand in for `_codecs.encode`, by which protocols 0 to 2 write bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"_codecs.encode to {encoding}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("_codecs", "encode"): _latin1,
    **{(module, "set"): set for module in ("builtins", "__builtin__")},
    **{(module, "frozenset"): frozenset for module in ("builtins", "__builtin__")},
}


class _Refused(Exception):
    """A pickle named something to import."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        allowed = _ALLOWED.get((module_name, global_name))
        if allowed is None:
            raise _Refused(f"{module_name}.{global_name}")
        return allowed

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("an object kept outside the file")


def read_pickle(path: Path) -> Any:
    """Return the plain value a pickle holds. Nothing is imported and nothing is called.

    Raises:
        CloverError: no such file, not a pickle, or it holds more than builtin containers, text,
            bytes and numbers.
    """
    try:
        with path.open("rb") as handle:
            return _PlainUnpickler(handle, encoding="utf-8", errors="replace").load()
    except _Refused as error:
        raise CloverError(
            f"{path} asks for {error}: of a pickle only lists, dicts, text and numbers are read; "
            "nothing was run"
        ) from error
    except FileNotFoundError as error:
        raise CloverError(f"no file {path}") from error
    except OSError:
        raise
    # A torn or made-up pickle fails with any of a dozen types, by the byte it breaks at.
    except Exception as error:
        raise CloverError(
            f"{path} is not a readable pickle ({error or 'it ends early'})"
        ) from error
