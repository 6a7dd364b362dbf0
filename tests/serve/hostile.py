"""What a hostile network sends: one generator for the test and for the benchmark.

Every attack is bytes on a socket, so that no client library tidies it up first.
"""

from __future__ import annotations

import base64
import io
import json
import random
import socket
import struct
import zlib
from collections.abc import Callable
from typing import Any

from PIL import Image

Attack = Callable[[random.Random], bytes]


def post(
    body: bytes, *, path: str = "/v1/chat/completions", kind: str = "application/json"
) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
    return (head + f"Content-Length: {len(body)}\r\n\r\n").encode() + body


def get(path: str, *lines: str) -> bytes:
    return ("\r\n".join([f"GET {path} HTTP/1.1", "Host: localhost", *lines]) + "\r\n\r\n").encode()


def asked(image: bytes | str, **more: Any) -> bytes:
    """Return a chat request about an image."""
    if isinstance(image, bytes):
        image = "data:image/png;base64," + base64.b64encode(image).decode()
    parts = [{"type": "text", "text": "which tissue is shown ?"}]
    parts.append({"type": "image_url", "image_url": {"url": image}})  # type: ignore[dict-item]
    body = {"model": "tiny", "messages": [{"role": "user", "content": parts}], **more}
    return post(json.dumps(body).encode())


def chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def png(width: int, height: int, data: bytes, *extra: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    parts = [b"\x89PNG\r\n\x1a\n", head, *extra, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"".join(parts)


def small(kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 40, 40)).save(buffer, kind)
    return buffer.getvalue()


ZEROS = zlib.compress(bytes(3_000_000))
TEXT_BOMB = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000), 9))
PROFILE_BOMB = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(80_000_000), 9))


def bombs(dice: random.Random) -> bytes:
    """Images that are larger inside than outside."""
    image = dice.choice(
        [
            png(10_000, 10_000, ZEROS),
            png(100_000, 1_000, ZEROS),
            png(2**31 - 1, 2**31 - 1, ZEROS),
            png(0, 0, ZEROS),
            png(1, 60_000, ZEROS),
            png(8, 8, ZEROS, TEXT_BOMB),
            png(8, 8, ZEROS, PROFILE_BOMB),
            png(4_000, 4_000, ZEROS),
        ]
    )
    return asked(image)


def polyglots(dice: random.Random) -> bytes:
    """Files that are two things, or half a thing."""
    whole = small()
    image = dice.choice(
        [
            whole + b"PK\x03\x04" + b"<script>alert(1)</script>",
            b"GIF89a/*" + whole,
            b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (r) file",
            whole[: len(whole) // 2],
            whole[:30] + bytes(dice.randrange(256) for _ in range(40)) + whole[30:],
            small("JPEG")[: dice.randrange(20, 400)],
            small("TIFF")[:8] + b"\xff" * 200,
            b"II*\0\x08\0\0\0\xff\xff" + bytes(200),
            b"RIFF\xff\xff\xff\xffWEBPVP8L" + bytes(60),
            bytes(dice.randrange(256) for _ in range(300)),
        ]
    )
    return asked(image)


def addresses(dice: random.Random) -> bytes:
    """Images that are somewhere else."""
    return asked(
        dice.choice(
            [
                "file:///etc/passwd",
                "http://127.0.0.1:22/",
                "http://169.254.169.254/latest/meta-data/",
                "http://[::ffff:127.0.0.1]/",
                "gopher://localhost/",
                "data:image/png,notbase64",
                "data:image/png;base64,====",
                "data:image/png;base64," + "A" * dice.randrange(1, 50),
                "//evil.example/a.png",
                "",
                "\u202e\x00",
            ]
        )
    )


def broken_json(dice: random.Random) -> bytes:
    """Bodies that are not JSON, or JSON that is no request."""
    image = {"type": "image_url", "image_url": {"url": "x"}}
    return post(
        dice.choice(
            [
                b"",
                b"{",
                b"[" * 100_000,
                b'{"a":' * 50_000,
                b"null",
                b"NaN",
                b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
                b'{"model": "\\udfff", "messages": [{"role": "user", "content": "a"}]}',
                b"\xff\xfe{}",
                b'{"model": "tiny", "messages": 1e400}',
                json.dumps({"model": ["tiny"], "messages": {}}).encode(),
                json.dumps({"model": "tiny", "messages": [{"role": "root"}]}).encode(),
                json.dumps(
                    {"model": "tiny", "messages": [{"role": "user", "content": [image] * 300}]}
                ).encode(),
                b'{"model":"tiny","temperature":NaN,"messages":[{"role":"user","content":"a"}]}',
                b'{"model":"tiny","seed":1' + b"0" * 5000 + b',"messages":[{"role":"user"}]}',
                b'{"model":"tiny","n":99999999999999999999,"messages":[]}',
                b'{"model":"' + b"a" * 100_000 + b'","messages":[{"role":"user","content":"a"}]}',
            ]
        ),
        kind=dice.choice(["application/json"] * 5 + ["text/plain", "", "multipart/form-data"]),
    )


def odd_fields(dice: random.Random) -> bytes:
    """A whole request with one field of another type."""
    values: list[Any] = [
        None,
        True,
        -1,
        0,
        1e308,
        1e-40,
        5e-324,
        "",
        "a",
        [],
        [[]],
        {},
        {"a": []},
        "\u0000",
        2**80,
    ]
    names = "temperature top_p n stop seed max_tokens stream logprobs top_logprobs response_format"
    names += (
        " stream_options presence_penalty tools logit_bias model messages max_completion_tokens"
    )
    return asked(small(), **{dice.choice(names.split()): dice.choice(values)})


def paths(dice: random.Random) -> bytes:
    """Addresses that look for files."""
    return get(
        dice.choice(
            [
                "/../../../../etc/passwd",
                "/..%2f..%2f..%2fetc%2fpasswd",
                "/page/..%2f..%2f..%2fetc%2fpasswd",
                "/page/....//....//etc/passwd",
                "/page/%2e%2e/%2e%2e/pyproject.toml",
                "/v1/models/..%2f..%2fetc%2fpasswd",
                "/v1/models/%00",
                "/v1/models/%ff%fe",
                "//etc/passwd",
                "/" + "a" * 20_000,
                "/v1/models?" + "a=1&" * 3000,
                "http://evil.example/v1/models",
                "/metrics/%2e%2e",
                "*",
            ]
        )
    )


def protocol(dice: random.Random) -> bytes:
    """What is no HTTP, or not the HTTP it says it is."""
    return dice.choice(
        [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"GET\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            get("/v1/models", "X: " + "a" * 200_000),
            get("/v1/models", "Content-Length: -5"),
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            get("/v1/models", "Host: evil.example"),
            get("/v1/models", "Origin: https://evil.example"),
            b"TRACE / HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nOrigin: http://a\r\n\r\n",
            b"DELETE /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
            get("/v1/models", "Upgrade: websocket", "Connection: Upgrade"),
            get("/v1/models", "Authorization: Bearer \xff"),
        ]
    )


ATTACKS: tuple[Attack, ...] = (
    bombs,
    polyglots,
    addresses,
    broken_json,
    odd_fields,
    paths,
    protocol,
)


def send(port: int, content: bytes, *, leave_after: int | None = None, seconds: float = 30) -> int:
    """Send bytes and return the status of the reply; 0 when the server hung up without one.

    Args:
        port: On loopback.
        content: What goes out.
        leave_after: Hang up after so many bytes, without reading.
        seconds: A server that is silent for longer has failed.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        try:
            connection.sendall(content if leave_after is None else content[:leave_after])
            if leave_after is not None:
                return 0
            data = b""
            while b"\r\n" not in data:
                part = connection.recv(65536)
                if not part:
                    return 0
                data += part
            status = int(data.split(b" ", 2)[1])
            # The rest is read, so that a reply in full was really sent.
            connection.settimeout(0.2)
            while connection.recv(65536):
                pass
        except (ConnectionError, BrokenPipeError):
            return 0
        except TimeoutError:
            if not data:
                raise
    return status
