"""The cheapest endpoint that answers a chat request after a while; it measures what reaches it.

    python -m benchmarks.endpoint [--delay 0.2]

Prints its port. Every reply is the same few pairs with a fixed count of tokens, made once;
`GET /count` gives the number of replies and the seconds between the first and the last of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time

PAIRS = "\n".join(
    f'question: "What is seen in part {number}?"\nanswer: "Crypts with fewer goblet cells."'
    for number in range(1, 5)
)
REPLY = {
    "id": "chatcmpl-0",
    "object": "chat.completion",
    "created": 0,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": PAIRS},
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 700, "completion_tokens": 80, "total_tokens": 780},
}


class Books:
    """When replies were sent."""

    def __init__(self) -> None:
        self.replies = 0
        self.first = self.last = 0.0

    def note(self) -> None:
        """Note one reply."""
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.replies += 1

    def row(self) -> dict[str, float]:
        """Return the count and the seconds from the first to the last reply."""
        return {"replies": self.replies, "seconds": self.last - self.first}


class _Connection(asyncio.Protocol):
    """One keep-alive connection; requests on it come one after the other."""

    def __init__(self, delay_s: float, books: Books) -> None:
        self._delay_s, self._books = delay_s, books
        self._data = b""
        self._reply = _http(REPLY)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, end, body = self._data.partition(b"\r\n\r\n")
        if not end or len(body) < _length(head):
            return
        self._data = b""
        if head.startswith(b"GET /count"):
            self._transport.write(_http(self._books.row()))
        elif self._delay_s:
            asyncio.get_running_loop().call_later(self._delay_s, self._answer)
        else:
            self._answer()

    def _answer(self) -> None:
        self._books.note()
        self._transport.write(self._reply)


def _length(head: bytes) -> int:
    _, found, rest = head.lower().partition(b"content-length:")
    return int(rest.split(b"\r\n", 1)[0]) if found else 0


def _http(value: object) -> bytes:
    body = json.dumps(value).encode()
    head = (
        f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def serve(delay_s: float) -> None:
    """Serve until the process is ended."""
    books = Books()
    server = await asyncio.get_running_loop().create_server(
        lambda: _Connection(delay_s, books), "127.0.0.1", 0, backlog=512
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--delay", type=float, default=0.2, help="seconds before each reply")
    asyncio.run(serve(parser.parse_args().delay))
