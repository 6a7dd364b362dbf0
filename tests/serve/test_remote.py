"""Images at addresses: public ones only, bounded, each redirect looked at again."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread, current_thread
from typing import Any

import pytest
from fastapi.testclient import TestClient
from tests.serve.running import seen

from clover.core.errors import CloverError
from clover.model import load
from clover.serve import remote
from clover.serve.app import create_app
from clover.serve.engine import Engine
from clover.serve.request import Served
from clover.serve.settings import ServeSettings


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server on loopback that is taken for public under the address 127.0.0.1 alone."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            targets = {"/inside": "http://127.0.0.2/secret", "/loop": "/loop", "/one": "/image"}
            self.send_response(302 if self.path in targets else 200)
            if self.path in targets:
                self.send_header("location", targets[self.path])
            self.end_headers()
            self.wfile.write(b"x" * 100)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(remote, "is_public", lambda address: address == "127.0.0.1")
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_public_is_what_anybody_may_reach(address: str, public: bool) -> None:
    assert remote.is_public(address) is public


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1/", "http://localhost/", "http://2130706433/", "http://[::1]/", "ftp://a/"],
)
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(CloverError, match=r"not a public address|not an http|no such host"):
        remote.fetch_image(url, max_bytes=100)


def test_files_are_bounded_and_redirects_looked_at_again(site: str) -> None:
    assert remote.fetch_image(site + "/one", max_bytes=100) == b"x" * 100
    with pytest.raises(CloverError, match="more than 99 bytes"):
        remote.fetch_image(site + "/image", max_bytes=99)
    with pytest.raises(CloverError, match=r"'127\.0\.0\.2' is not a public address"):
        remote.fetch_image(site + "/inside", max_bytes=100)
    with pytest.raises(CloverError, match="redirects more than 3 times"):
        remote.fetch_image(site + "/loop", max_bytes=100)
    with pytest.raises(CloverError, match="name or password"):
        remote.fetch_image("http://a:b@127.0.0.1/", max_bytes=100)


@pytest.fixture
def dripping(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes, bytes], Dripping]]:
    monkeypatch.setattr(remote, "is_public", lambda address: address == "127.0.0.1")
    servers: list[Dripping] = []

    def start(at_once: bytes, drop: bytes) -> Dripping:
        servers.append(Dripping(at_once, drop))
        return servers[-1]

    yield start
    for server in servers:
        server.listener.close()


class Dripping:
    """Sends something at once and then a drop at a time, until whoever listens has left."""

    def __init__(self, at_once: bytes, drop: bytes) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.was_left = Event()
        self._at_once, self._drop = at_once, drop
        Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        connection, _ = self.listener.accept()
        with connection:
            try:
                connection.sendall(self._at_once)
                while True:
                    connection.sendall(self._drop)
                    time.sleep(0.02)
            except OSError:
                self.was_left.set()


HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("scheme", "at_once", "drop"),
    [
        ("http", b"", b"H"),
        ("http", HEAD + b"x: ", b"x"),
        ("http", HEAD + b"content-length: 99999999\r\n\r\n", b"x"),
        ("http", HEAD + b"transfer-encoding: chunked\r\n\r\n4;", b"x"),
        ("http", HEAD + b"\r\n", b"x"),
        ("https", b"\x16\x03\x03\x3f\x00", b"\x00"),  # a TLS record that never ends
    ],
    ids=["status", "header", "body", "chunk", "until it closes", "handshake"],
)
def test_drops_do_not_hold_a_fetch_beyond_its_deadline(
    dripping: Callable[[bytes, bytes], Dripping], scheme: str, at_once: bytes, drop: bytes
) -> None:
    server = dripping(at_once, drop)
    url = f"{scheme}://127.0.0.1:{server.listener.getsockname()[1]}/"
    with pytest.raises(CloverError, match="too slow"):
        remote.fetch_image(url, max_bytes=1 << 20, seconds=0.3)
    # No verdict on speed: a fetch that waits on would never let the server go.
    assert server.was_left.wait(60)


def test_each_wait_is_for_what_is_left_until_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(remote.time, "monotonic", lambda: clock[0])
    waits: list[float] = []

    class Slow:
        settimeout = staticmethod(waits.append)

        def recv_into(self, buffer: Any) -> int:
            clock[0] += 4
            return 1

    reader = remote._Hurried(Slow(), 110.0)  # type: ignore[arg-type]
    with pytest.raises(TimeoutError):
        while reader.readinto(bytearray(1)):
            pass
    assert waits == [10, 6, 2]


def test_fetches_have_threads_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, site: str
) -> None:
    clover = load(tiny_model, device="cpu", precision="float32")
    settings = ServeSettings(allow_image_urls=True)
    engine = Engine([Served("tiny", clover.language, clover)], settings)  # type: ignore[arg-type]
    names: list[str] = []

    def fetch(url: str, **_: Any) -> bytes:
        names.append(current_thread().name)
        raise CloverError("seen")

    monkeypatch.setattr("clover.serve.completion.fetch_image", fetch)
    body = {"model": "tiny", "messages": [seen("what ?", site)]}
    with TestClient(create_app(engine, settings), base_url="http://127.0.0.1") as client:
        assert client.post("/v1/chat/completions", json=body).status_code == 400
    engine.close()
    assert names and names[0].startswith("clover-fetch")
