"""One thread that computes, and what it serves: adapters on one frozen language model.

In: questions about images, from any thread. Out: tokens as they are written. Everything that
touches a model runs in the engine's thread, so that nothing here needs a lock; `call` runs a
caller's own function there (heat maps, slide regions).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from clover.model import Clover
    from clover.serve.settings import ServeSettings

Result = TypeVar("Result")


class Engine:
    """Answers questions.

    Args:
        adapters: Models by the name clients call them; they share a language model.
        settings: Limits.
    """

    def __init__(self, adapters: Mapping[str, Clover], settings: ServeSettings) -> None:
        self.adapters = dict(adapters)
        self.settings = settings
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="clover-engine", daemon=True)
        self._thread.start()

    def call(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Run a function in the engine's thread, between two steps; return its future."""
        future: Future[Result] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*arguments))
                except BaseException as error:
                    future.set_exception(error)

        self._calls.put(run)
        return future

    def close(self) -> None:
        """End the thread."""
        self._calls.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (run := self._calls.get()) is not None:
            run()
