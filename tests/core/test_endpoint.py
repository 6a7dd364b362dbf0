"""The way to an endpoint: what is addressed to this machine meets no proxy and follows nobody."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from clover.core.endpoint import (
    Client,
    Refused,
    check_endpoint,
    find_key,
    http_client,
    is_loopback,
    pause_s,
)
from clover.core.errors import CloverError

BODY = {"model": "m", "messages": [{"role": "user", "content": "liver"}], "max_tokens": 4}


@contextlib.contextmanager
def listening(*, moves_to: str | None = None) -> Iterator[tuple[str, list[str]]]:
    """Answer every request; yield the API's address and what was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(self.path)
            message = {"role": "assistant", "content": "yes"}
            data = json.dumps({"choices": [{"message": message}]}).encode()
            self.send_response(200 if moves_to is None else 307)
            if moves_to is not None:
                self.send_header("Location", moves_to + self.path)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()


def send(endpoint: str) -> str:
    async def run() -> str:
        async with Client(endpoint, key="none", timeout_s=20) as client:
            return (await client.send(BODY)).text

    return asyncio.run(run())


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let the environment name a proxy for everything; yield what reaches it."""
    with listening() as (proxy, carried):
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy)
            monkeypatch.setenv(name.upper(), proxy)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        yield carried


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_what_is_for_this_machine_meets_no_proxy(proxied: list[str], host: str) -> None:
    with listening() as (url, asked):
        assert send(url.replace("127.0.0.1", host) + "/v1") == "yes"
    assert asked == ["/v1/chat/completions"] and proxied == []


def test_a_streaming_client_for_this_machine_meets_no_proxy_either(proxied: list[str]) -> None:
    """The gateway to a vLLM server streams, so it does not go the plain way."""

    async def run(url: str) -> int:
        async with http_client(url) as client:
            return int((await client.post(url + "/v1/completions", json={})).status_code)

    with listening() as (url, asked):
        assert asyncio.run(run(url)) == 200
    assert asked == ["/v1/completions"] and proxied == []


def test_what_is_for_elsewhere_takes_the_proxy(proxied: list[str]) -> None:
    """Or the tests above could not fail."""
    assert send("http://elsewhere.invalid/v1") == "yes"
    assert proxied == ["http://elsewhere.invalid/v1/chat/completions"]


def test_nothing_is_sent_where_an_endpoint_points_to() -> None:
    with listening() as (other, reached), listening(moves_to=other) as (url, asked):
        with pytest.raises(CloverError, match="no such address or model"):
            send(url + "/v1")
        assert len(asked) == 1 and reached == []


def test_a_key_is_needed_elsewhere_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    assert find_key("http://[::1]:8000/v1", "SOME_KEY") == "none"
    with pytest.raises(CloverError, match="SOME_KEY is not set"):
        find_key("https://elsewhere.invalid/v1", "SOME_KEY")
    monkeypatch.setenv("SOME_KEY", "right")
    assert find_key("https://elsewhere.invalid/v1", "SOME_KEY") == "right"


@pytest.mark.parametrize("key", ["schlüssel", "first\nsecond", "two words", "\udcfc"])
def test_what_no_header_can_carry_is_no_key(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("SOME_KEY", key)
    with pytest.raises(CloverError, match="SOME_KEY is no API key: its character") as told:
        find_key("https://elsewhere.invalid/v1", "SOME_KEY")
    assert key not in str(told.value)


@pytest.mark.parametrize(
    "address",
    [
        *("http://127.0.0.1:99999/v1", "http://h:abc/v1", "http://h:0/v1", "http://[::1/v1"),
        *("http://two words/v1", "http://a..b/v1", "http://a\nb/v1", "http://:80/v1", ""),
    ],
)
def test_a_malformed_address_is_named(address: str) -> None:
    with pytest.raises(CloverError, match="is not a URL such as"):
        check_endpoint(address)


def test_a_request_that_cannot_be_built_is_not_taken_for_a_lost_one() -> None:
    async def run(url: str) -> None:
        async with Client(url, key="none", timeout_s=20) as client:
            await client.send({**BODY, "temperature": float("nan")})

    with listening() as (url, asked):
        with pytest.raises(CloverError, match=r"cannot be built .* nothing sent"):
            asyncio.run(run(url + "/v1"))
        assert asked == []


def test_addresses_are_read() -> None:
    assert check_endpoint(" http://a/v1/chat/completions ") == "http://a/v1"
    with pytest.raises(CloverError, match="'ftp://a' is not a URL"):
        check_endpoint("ftp://a")
    assert [is_loopback(f"http://{host}/v1") for host in ("127.9.9.9", "[::1]", "localhost")] == [
        True
    ] * 3
    assert not is_loopback("http://127.0.0.1.example.org/v1")


def test_a_pause_is_what_the_endpoint_asks_for_or_grows() -> None:
    assert 7 <= pause_s(Refused("busy", retry_after=7.0), 1, 60) <= 7.25
    assert [0.5 <= pause_s(None, 1, 60) <= 1, 2 <= pause_s(None, 3, 60) <= 4] == [True, True]
    assert pause_s(None, 30, 60) <= 60


@pytest.mark.parametrize(
    ("proxy", "words"),
    [
        ("socks5://127.0.0.1:1080", "pip install socksio"),
        ("nonsense://127.0.0.1:1080", "mend or unset the variable"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_one_line(
    proxy: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)  # as where it is not installed
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(CloverError, match=words) as error:
        Client("https://models.example/v1", key="k", timeout_s=1)
    assert "nothing sent" in str(error.value) and "\n" not in str(error.value)
    http_client("http://127.0.0.1:8000/v1")  # what is on this machine meets no proxy
