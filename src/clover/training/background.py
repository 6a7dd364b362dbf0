"""One thing written at a time, beside the training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

_LOG = logging.getLogger(__name__)


class BackgroundWriter:
    """A thread that writes while the caller goes on.

    What goes wrong in it is raised in the caller, at the next `start` or at the end of the `with`
    block, which waits for what is being written.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[object] | None = None

    def __enter__(self) -> BackgroundWriter:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Wait for what is being written.

        An error of the block's own is not hidden by one here; but who asked to stop is told that
        the state was not saved.
        """
        try:
            self._wait()
        except Exception as failed:
            if error is None or isinstance(error, KeyboardInterrupt):
                raise
            _LOG.warning("the last checkpoint was not written: %s", failed)
        finally:
            self._pool.shutdown()

    def start(self, write: Callable[[], object]) -> None:
        """Begin to write, once what was begun before is done.

        Args:
            write: Must not read what the caller goes on changing.
        """
        self._wait()
        self._writing = self._pool.submit(write)

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
