"""A server that listens: the port, the start, and an end that lets running answers finish."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from clover.core.errors import CloverError
from clover.serve.settings import ServeSettings

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI


def listen(settings: ServeSettings) -> socket.socket:
    """Return a socket that listens where the settings say.

    Raises:
        CloverError: the port is taken, or no such address is this machine's.
    """
    host, port = settings.host, settings.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), port))
        # Bound and listening before anything is loaded: two servers never share a port.
        listener.listen(256)
    except PermissionError as error:
        listener.close()
        raise CloverError(f"port {port} needs rights; choose one above 1023") from error
    except OSError as error:
        listener.close()
        if isinstance(error, socket.gaierror) or "assign" in str(error):
            raise CloverError(f"{host} is no address of this machine; try 127.0.0.1") from error
        raise CloverError(f"port {port} is taken; choose another, or 0 for a free one") from error
    return listener


def build_server(app: FastAPI, settings: ServeSettings) -> uvicorn.Server:
    """Return a server that is not yet running; SIGTERM and Ctrl-C let running answers finish."""
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=round(settings.drain_seconds),
        h11_max_incomplete_event_size=65536,
    )
    return uvicorn.Server(config)


@contextlib.contextmanager
def serving(app: FastAPI, settings: ServeSettings) -> Iterator[str]:
    """Serve in a thread for as long as the context lasts; yield the API's base URL.

    Raises:
        CloverError: the port is taken, or the server does not start.
    """
    listener = listen(settings)
    server = build_server(app, settings)
    thread = threading.Thread(
        target=server.run, kwargs={"sockets": [listener]}, name="clover-server", daemon=True
    )
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise CloverError("the server did not start; see the log above")
            time.sleep(0.01)
        yield f"http://{settings.host}:{listener.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(timeout=settings.drain_seconds + 5)
        listener.close()
