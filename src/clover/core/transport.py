"""HTTP/1.1 to an endpoint on this machine, for many small requests at the same time.

The client's own transport is made for all that the web may bring: TLS, proxies, HTTP/2, two async
libraries. Half a millisecond of each request goes into that, and every request gives way to the
others several times, so that those which came together leave together, and late. Here a request is
written in one go and its reply read as it comes. h11 does the protocol.
"""

from __future__ import annotations

import asyncio

import h11
import httpx2


class LocalTransport(httpx2.AsyncBaseTransport):
    """Plain http with as many connections as there are requests at once; idle ones are kept."""

    def __init__(self) -> None:
        self._idle: list[_Connection] = []

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request and return its whole reply.

        Raises:
            httpx2.ConnectError: nobody listens there.
            httpx2.TimeoutException: no connection, or no whole reply, in time.
            httpx2.TransportError: the connection broke, or what came is no HTTP.
        """
        body = await request.aread()
        timeouts = request.extensions.get("timeout", {})
        # What has arrived since is seen first: a reply that nobody asked for closes a connection.
        await asyncio.sleep(0)
        connection = self._take_idle() or await _connect(request.url, timeouts.get("connect"))
        try:
            async with asyncio.timeout(timeouts.get("read")):
                response = await connection.exchange(request, body)
        except TimeoutError as error:
            connection.close()
            raise httpx2.ReadTimeout("no whole reply in time") from error
        except BaseException:
            # Also when cancelled: the reply of this request must not be taken for the next one's.
            connection.close()
            raise
        if connection.is_usable:
            self._idle.append(connection)
        else:
            connection.close()
        return response

    def _take_idle(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable:
                return connection
            connection.close()
        return None

    async def aclose(self) -> None:
        """Close what is open."""
        while self._idle:
            self._idle.pop().close()


async def _connect(url: httpx2.URL, timeout_s: float | None) -> _Connection:
    try:
        async with asyncio.timeout(timeout_s):
            _, connection = await asyncio.get_running_loop().create_connection(
                _Connection, url.host, url.port or 80
            )
    except TimeoutError as error:
        raise httpx2.ConnectTimeout(f"no connection to {url.host} in time") from error
    except OSError as error:
        raise httpx2.ConnectError(str(error)) from error
    return connection


class _Connection(asyncio.Protocol):
    """One connection: one request at a time."""

    def __init__(self) -> None:
        self.is_usable = False
        self._http = h11.Connection(h11.CLIENT)
        self._reply: asyncio.Future[httpx2.Response] | None = None
        self._head: h11.Response | None = None
        self._parts: list[bytes] = []

    async def exchange(self, request: httpx2.Request, body: bytes) -> httpx2.Response:
        """Send a request, wait for its reply."""
        self._head, self._parts = None, []
        self._reply = asyncio.get_running_loop().create_future()
        head = h11.Request(
            method=request.method, target=request.url.raw_path, headers=request.headers.raw
        )
        data = [self._http.send(event) for event in (head, h11.Data(body), h11.EndOfMessage())]
        self._transport.write(b"".join(part for part in data if part))
        return await self._reply

    def close(self) -> None:
        """Close; also one that is closed."""
        self.is_usable = False
        self._transport.close()

    # -- called by the event loop ---------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.is_usable = True

    def data_received(self, data: bytes) -> None:
        if self._reply is None or self._reply.done():
            self.close()  # nobody asked: a reply that came twice
            return
        self._http.receive_data(data)
        self._read()

    def eof_received(self) -> None:
        self.is_usable = False
        if self._reply is not None and not self._reply.done():
            self._http.receive_data(b"")
            self._read()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_usable = False
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(httpx2.ReadError(str(exc or "the connection was closed")))

    def _read(self) -> None:
        assert self._reply is not None
        try:
            while (event := self._http.next_event()) is not h11.NEED_DATA:
                if isinstance(event, h11.Response):
                    self._head = event
                elif isinstance(event, h11.Data):
                    self._parts.append(bytes(event.data))
                elif isinstance(event, h11.EndOfMessage):
                    self._finish()
                    return
        except h11.RemoteProtocolError as error:
            self.is_usable = False
            self._reply.set_exception(httpx2.RemoteProtocolError(str(error)))

    def _finish(self) -> None:
        assert self._reply is not None and self._head is not None
        response = httpx2.Response(
            self._head.status_code,
            headers=self._head.headers.raw_items(),
            content=b"".join(self._parts),
        )
        self._reply.set_result(response)
        rest, _ = self._http.trailing_data
        if rest or self._http.their_state is not h11.DONE:
            self.is_usable = False
        else:
            self._http.start_next_cycle()
