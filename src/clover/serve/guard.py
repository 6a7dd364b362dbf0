"""What stands before every route: who may ask, from where, how much, and for how long.

A plain ASGI layer, so that a client that leaves is seen by the route behind it. Order: is the host
name ours (a page of another site whose name was pointed at this machine is not), does the request
come from a page of ours, is the token right, is there room, is the body short and quick enough.
Whatever fails behind it is logged here and told as one sentence.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from clover.serve.settings import ServeSettings, is_loopback
from clover.serve.wire import error_body

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_LOG = logging.getLogger(__name__)
_MAX_REQUESTS = 256
"""Requests at the same time, waiting and running: each may hold a body."""
_OPEN = ("/", "/health", "/favicon.ico")
_OPEN_FOLDER = "/page/"
"""Static files of the page: a browser cannot send a token for them, and they hold no secret."""
_GRACE_SECONDS = 30.0
"""For a client to take its answer, after the answer itself had to be ready."""


class Refusal(Exception):
    """A request that goes no further."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


class Guard:
    """Stands before an application.

    Args:
        app: The application.
        settings: Limits.
        responses: Counts answers by status, for the metrics.
    """

    def __init__(self, app: App, settings: ServeSettings, responses: Counter[int]) -> None:
        self._app, self._settings, self._responses = app, settings, responses
        self._num_requests = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def watched(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                self._responses[message["status"]] += 1
                message["headers"] = [*message.get("headers", ()), *_SAFE_HEADERS]
            await send(message)

        self._num_requests += 1
        try:
            await self._pass(scope, receive, watched)
        except Refusal as refusal:
            await _refuse(watched, refusal)
        except TimeoutError:
            if not has_begun:
                await _refuse(watched, Refusal(408, "the answer took too long; ask again later"))
        except _Gone:
            pass
        except Exception:
            _LOG.exception("a request failed")
            if not has_begun:
                await _refuse(watched, Refusal(500, "the server failed; its log says why"))
        finally:
            self._num_requests -= 1

    async def _pass(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = _headers(scope)
        path = scope["path"]
        self._check_host(headers)
        self._check_origin(headers)
        if not (path in _OPEN or path.startswith(_OPEN_FOLDER)):
            self._check_token(headers)
        if path != "/health" and self._num_requests > _MAX_REQUESTS:
            raise Refusal(
                429, f"{_MAX_REQUESTS} requests are open; come again later", **{"retry-after": "2"}
            )
        body = await self._read_body(headers, receive)
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        async with asyncio.timeout(self._settings.answer_seconds + _GRACE_SECONDS):
            await self._app(scope, replay, send)

    def _check_host(self, headers: dict[str, str]) -> None:
        name = _host_name(headers.get("host", ""))
        settings = self._settings
        if not is_loopback(settings.host) and not settings.hosts:
            return  # reached under names we cannot know; the token is what keeps others out
        # Names have no case, and `_host_name` gives the client's in lower case.
        own = {settings.host.strip("[]").lower(), *self._given_names()}
        if not (is_loopback(name) or name in own):
            raise Refusal(
                403, f"this server is not '{_short(name)}'; name it with --allow-host if it is"
            )

    def _check_origin(self, headers: dict[str, str]) -> None:
        origin = headers.get("origin")
        if origin is None:
            return
        try:
            theirs = urlsplit(origin).netloc.lower()
        except ValueError:
            theirs = ""
        if theirs and theirs == headers.get("host", "").lower():
            return
        # A reverse proxy mostly puts another Host there, or leaves out the port. Not so for this
        # machine's own names: each of its ports may be another program's.
        name = _host_name(theirs)
        if name in self._given_names() and not is_loopback(name):
            return
        raise Refusal(
            403,
            f"pages of '{_short(theirs or origin)}' may not ask here; start the server with "
            "--allow-host and that name if it is its own",
        )

    def _given_names(self) -> set[str]:
        """Return the names given with --allow-host, in lower case."""
        return {item.lower() for item in self._settings.hosts if item}

    def _check_token(self, headers: dict[str, str]) -> None:
        token = self._settings.token
        if token is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), token.encode())
        if scheme.lower() != "bearer" or not right:
            raise Refusal(
                401,
                "the token is absent or wrong; send it as 'Authorization: Bearer TOKEN'",
                **{"www-authenticate": "Bearer"},
            )

    async def _read_body(self, headers: dict[str, str], receive: Receive) -> bytes:
        limit = self._settings.max_body_bytes
        too_long = Refusal(
            413,
            f"the request has more than {limit:,} bytes; send a smaller image",
            connection="close",
        )
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length) > limit:
            raise too_long
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise too_long
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError as error:
            raise Refusal(
                408,
                f"the request did not arrive in {self._settings.body_seconds:g} s",
                connection="close",
            ) from error


class _Gone(Exception):
    """The client left before it had said what it wants."""


_SAFE_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


async def _refuse(send: Send, refusal: Refusal) -> None:
    body = json.dumps(error_body(refusal.status, str(refusal))).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((name.encode(), value.encode()) for name, value in refusal.headers.items()),
    ]
    start = {"type": "http.response.start", "status": refusal.status, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": body})


def _headers(scope: Message) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def _host_name(host: str) -> str:
    """Return the name of a Host header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _short(text: str) -> str:
    return "".join(sign if sign.isprintable() else "?" for sign in text[:60])
