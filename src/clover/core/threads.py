"""Which of a process's threads compute.

Each thread that asks torch for a parallel operation gets helper threads of its own, which stay, and
are counted, for as long as it lives. Once all together are more than the cores, OpenMP (GNU's, as
torch brings it) puts helpers to sleep after each operation, and waking one takes 40 microseconds:
two times as long for each token that a server writes, whose loading thread has long been idle.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextvars import copy_context
from typing import Any, TypeVar

Result = TypeVar("Result")


def in_passing_thread(function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """Run a function in a thread that ends with it, and its helper threads too.

    For what computes before another thread does all the computing. Returns what the function
    returns and raises what it raises. An interrupt (Ctrl-C) ends the function at its next line, as
    it would without a thread. The function sees the caller's context variables, but not torch's own
    state of a thread (no_grad, autocast).
    """
    found: list[Result] = []
    failed: list[BaseException] = []
    is_over = threading.Event()

    def run() -> None:
        try:
            found.append(function(*args, **kwargs))
        except BaseException as error:
            failed.append(error)
        finally:
            is_over.set()

    # Not a daemon: Python ends with one inside torch by a crash.
    thread = threading.Thread(target=copy_context().run, args=(run,))
    thread.start()
    interrupt: KeyboardInterrupt | None = None
    while not is_over.is_set():
        try:
            # Not `join`, which takes the thread for ended when it is interrupted itself (Python
            # 3.11); and without a limit Windows would not hear Ctrl-C.
            is_over.wait(timeout=0.2)
        except KeyboardInterrupt as error:
            interrupt = error
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident or 0), ctypes.py_object(KeyboardInterrupt)
            )
    thread.join()
    if interrupt is not None:
        raise interrupt
    if failed:
        raise failed[0]
    return found[0]
