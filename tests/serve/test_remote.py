"""Images at addresses: public ones only, bounded, each redirect looked at again."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from clover.core.errors import CloverError
from clover.serve import remote


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
