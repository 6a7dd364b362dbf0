"""Which process works on what, where several fill one folder."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TypeVar

from clover.core.files import fingerprint, growing

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

Piece = TypeVar("Piece")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Of a file system without locks: everybody may go on, at worst work is done twice."""


def number_of(piece: object) -> int:
    """Return the number by which processes claim a JSON-able piece of work."""
    return int(fingerprint(piece), 16) % (1 << 31)


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

    def each_once(
        self,
        pieces: Sequence[Piece],
        *,
        is_left: Callable[[Piece], bool],
        do: Callable[[Piece], None],
    ) -> None:
        """Do the pieces that are left, each in one of the processes that come here with them.

        Returns when all are done, those of other processes too.

        Args:
            pieces: JSON-able; the same everywhere.
            is_left: Whether nobody has done a piece; asked again once it is ours.
            do: Does one.
        """
        busy = [piece for piece in pieces if not self._is_settled(piece, is_left, do, wait=False)]
        for piece in busy:  # one at a time: nothing is held while waiting
            self._is_settled(piece, is_left, do, wait=True)

    def _is_settled(
        self,
        piece: Piece,
        is_left: Callable[[Piece], bool],
        do: Callable[[Piece], None],
        *,
        wait: bool,
    ) -> bool:
        """Do a piece, unless it is done; return False where another process is at it."""
        if not is_left(piece):
            return True
        if not self.take(number_of(piece), wait=wait):
            return False
        try:
            if is_left(piece):  # who had it before may have finished it
                do(piece)
        finally:
            self.give_back(number_of(piece))
        return True
