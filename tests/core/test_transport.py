"""The transport to this machine: every way a reply may come, and every way it may not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import httpx2
import pytest

from clover.core.transport import LocalTransport

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


def talk(answer: Answer, times: int = 1, timeout_s: float = 30.0) -> tuple[list[bytes], int]:
    """Ask a server that answers so; return the bodies and how many connections were made."""

    async def run() -> tuple[list[bytes], int]:
        connections = 0

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections
            connections += 1
            try:
                while True:
                    await reader.readuntil(b"{asked}")
                    await answer(reader, writer)
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        bodies = []
        async with httpx2.AsyncClient(transport=LocalTransport(), timeout=timeout_s) as client:
            for _ in range(times):
                reply = await client.post(f"http://127.0.0.1:{port}/v1", content=b"{asked}")
                bodies.append(reply.content)
                # What the server does next (close, answer twice) must have arrived.
                await asyncio.sleep(0.05)
        server.close()
        return bodies, connections

    return asyncio.run(run())


def writes(*parts: bytes, then_close: bool = False) -> Answer:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.01)
        if then_close:
            writer.close()

    return answer


def test_a_connection_is_used_again() -> None:
    assert talk(writes(WHOLE), times=3) == ([b"{}"] * 3, 1)


def test_a_reply_may_come_in_pieces_in_chunks_or_until_the_end() -> None:
    pieces = [WHOLE[i : i + 7] for i in range(0, len(WHOLE), 7)]
    assert talk(writes(*pieces), times=2) == ([b"{}"] * 2, 1)
    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n"
    assert talk(writes(chunks), times=2) == ([b"{}"] * 2, 1)
    endless = writes(b"HTTP/1.1 200 OK\r\n\r\n{", b"}", then_close=True)
    assert talk(endless, times=2) == ([b"{}"] * 2, 2)


def test_what_was_closed_meanwhile_is_not_used_again() -> None:
    assert talk(writes(WHOLE, then_close=True), times=3) == ([b"{}"] * 3, 3)


def test_a_reply_that_came_twice_is_not_taken_for_the_next_one() -> None:
    number = 0

    async def twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal number
        number += 1
        writer.write(2 * WHOLE.replace(b"{}", b"%02d" % number))
        await writer.drain()

    bodies, connections = talk(twice, times=3)
    assert bodies == [b"01", b"02", b"03"]
    assert connections == 3


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (writes(WHOLE[:-1], then_close=True), httpx2.RemoteProtocolError),
        (writes(b"", then_close=True), httpx2.RemoteProtocolError),
        (writes(b"SSH-2.0-x\r\n\r\n"), httpx2.RemoteProtocolError),
    ],
)
def test_half_a_reply_none_or_another_protocol_is_an_error(
    answer: Answer, error: type[Exception]
) -> None:
    with pytest.raises(error):
        talk(answer)


def test_a_reply_that_does_not_come_in_time_is_a_timeout() -> None:
    with pytest.raises(httpx2.ReadTimeout):
        talk(writes(), timeout_s=0.1)


def test_nobody_there_is_a_connect_error() -> None:
    async def run() -> None:
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        async with httpx2.AsyncClient(transport=LocalTransport()) as client:
            await client.post(f"http://127.0.0.1:{port}/v1", content=b"{asked}")

    with pytest.raises(httpx2.ConnectError):
        asyncio.run(run())
