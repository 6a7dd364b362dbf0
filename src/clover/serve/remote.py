"""Images at http(s) addresses: public addresses only, bounded in bytes, time and redirects.

The name is resolved once and the connection goes to the address that was looked at, so that a name
which answers differently the second time (DNS rebinding) gains nothing. Every redirect is looked at
again. No proxy, no cookies, no credentials.

A socket's own timeout begins anew with every piece that comes, so that a byte now and then would
keep it waiting for ever: before each piece it is set to what is left until one deadline. Only the
system's resolver of names keeps a time of its own.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import socket
import ssl
import time
from typing import Any
from urllib.parse import urljoin, urlsplit

from clover.core.errors import CloverError
from clover.serve.picture import shown

_MAX_REDIRECTS = 3
_CHUNK = 65536
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def fetch_image(url: str, *, max_bytes: int, seconds: float = 10.0) -> bytes:
    """Return what lies at an address.

    Args:
        url: http or https.
        max_bytes: Longest file.
        seconds: For everything, redirects included.

    Raises:
        CloverError: not a public address, too long, too slow, too many redirects, not there.
    """
    deadline = time.monotonic() + seconds
    for _ in range(_MAX_REDIRECTS + 1):
        found = _get(url, max_bytes=max_bytes, deadline=deadline)
        if isinstance(found, bytes):
            return found
        url = urljoin(url, found)
    raise CloverError(f"the image's address redirects more than {_MAX_REDIRECTS} times")


def _get(url: str, *, max_bytes: int, deadline: float) -> bytes | str:
    """Return the body, or where the address redirects to."""
    host, port, path, is_secret = _parts(url)
    address = public_address(host, port)
    kind = http.client.HTTPSConnection if is_secret else http.client.HTTPConnection
    connection = kind(host, port)
    try:
        with _connected(address, host, port, is_secret, deadline) as connected:
            connection.sock = _Hurried(connected, deadline)
            connection.request("GET", path, headers={"User-Agent": "clover", "Accept": "image/*"})
            response = connection.getresponse()
            location = response.getheader("location")
            if response.status in (301, 302, 303, 307, 308) and location:
                return location
            if response.status != 200:
                raise CloverError(f"the image's address answers {response.status}")
            return _body(response, max_bytes=max_bytes)
    except TimeoutError as error:
        raise CloverError(
            "the image's address is too slow; send the image as a data URI"
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise CloverError(
            f"the image cannot be fetched ({type(error).__name__}); send it as a data URI"
        ) from error


def _body(response: http.client.HTTPResponse, *, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while part := response.read1(_CHUNK):
        parts.append(part)
        size += len(part)
        if size > max_bytes:
            raise CloverError(f"the image has more than {max_bytes:,} bytes; send a smaller one")
    return b"".join(parts)


def _parts(url: str) -> tuple[str, int, str, bool]:
    """Return an address's host, port and path, and whether it is https.

    Raises:
        CloverError: it is no address that is fetched.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise CloverError(f"'{shown(url)}' is not an address") from error
    if parts.scheme not in ("http", "https") or not host:
        raise CloverError(f"'{shown(url)}' is not an http(s) address")
    if parts.username is not None or parts.password is not None:
        raise CloverError("the image's address carries a name or password; leave them out")
    if any(ord(sign) <= 32 or ord(sign) > 126 for sign in url):
        raise CloverError(f"'{shown(url)}' holds signs that an address may not hold")
    is_secret = parts.scheme == "https"
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return host, port or (443 if is_secret else 80), path, is_secret


def _connected(
    address: str, host: str, port: int, is_secret: bool, deadline: float
) -> socket.socket:
    """Return a socket that is connected to `address`, and speaks TLS with `host` where asked."""
    connected = socket.create_connection((address, port), timeout=_left(deadline))
    if not is_secret:
        return connected
    try:
        connected.settimeout(_left(deadline))  # of the whole handshake, which Python keeps
        return ssl.create_default_context().wrap_socket(connected, server_hostname=host)
    except BaseException:
        connected.close()
        raise


def _left(deadline: float) -> float:
    """Return the seconds until a deadline.

    Raises:
        TimeoutError: there are none.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _Hurried(io.RawIOBase):
    """A socket as `http.client` uses one, every wait of which ends at the deadline.

    Closing it leaves the socket open: a response is read on when its connection is closed already.
    """

    def __init__(self, connected: socket.socket, deadline: float) -> None:
        self._connected, self._deadline = connected, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connected.settimeout(_left(self._deadline))
        return self._connected.recv_into(buffer)

    def sendall(self, content: bytes) -> None:
        self._connected.settimeout(_left(self._deadline))
        self._connected.sendall(content)

    def makefile(self, *_: Any) -> io.BufferedReader:
        return io.BufferedReader(_Hurried(self._connected, self._deadline))


def public_address(host: str, port: int) -> str:
    """Resolve a name to an address that anybody may reach.

    Raises:
        CloverError: there is none, or one of the addresses is not public.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise CloverError(f"no such host as '{shown(host)}'") from error
    addresses = [str(item[4][0]).split("%")[0] for item in found]
    for address in addresses:
        if not is_public(address):
            raise CloverError(
                f"'{shown(host)}' is not a public address; send the image as a data URI"
            )
    return addresses[0]


def is_public(address: str) -> bool:
    """Return whether an IP address belongs to the public internet."""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour
        if parsed in _NAT64:
            inner = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return parsed.is_global and not parsed.is_multicast and not parsed.is_reserved
