"""What the C library does with memory that is freed."""

from __future__ import annotations

import contextlib
import ctypes
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of <malloc.h>
_LARGEST_KEPT = 2**31 - 1


@cache
def keep_freed_memory() -> None:
    """Let the C library keep large freed blocks instead of giving each back to the system.

    A training step, or a shard of features, frees and asks again for the same tens of megabytes;
    each time the system would zero them anew, page by page: a tenth of a small step, and more than
    all else that turns EVA-g's tokens into half precision. Only glibc is asked.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_TRIM_THRESHOLD, _LARGEST_KEPT)


def give_freed_memory_back() -> None:
    """Let the C library give the system what is freed between blocks in use, once.

    Opening a million pairs frees as much as it keeps, in pieces. Only glibc is asked.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
