"""Which process works on what, where several fill one folder."""

from __future__ import annotations

import errno
from pathlib import Path
from types import ModuleType, TracebackType

from clover.core.files import growing

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Of a file system without locks: everybody may go on, at worst work is done twice."""


class Claims:
    """Locks on numbers, one file for all of them; a process that dies gives its own back.

    Args:
        path: The lock file; empty, and made when absent.
    """

    def __init__(self, path: Path) -> None:
        with growing(path):
            self._handle = path.open("ab")

    def __enter__(self) -> Claims:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give everything back."""
        self._handle.close()

    def take(self, number: int, *, wait: bool = False) -> bool:
        """Return whether the number is now ours; with `wait`, only once it is."""
        if fcntl is None:
            return True
        how = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
        try:
            fcntl.lockf(self._handle, how, 1, number)
        except OSError as error:
            if not wait and error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in _NO_LOCKS:
                raise
        return True

    def give_back(self, number: int) -> None:
        """Let others have the number."""
        if fcntl is None:
            return
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_UN, 1, number)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
