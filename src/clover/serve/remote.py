"""Images at http(s) addresses: public addresses only, bounded in bytes, time and redirects.

The name is resolved once and the connection goes to the address that was looked at, so that a name
which answers differently the second time (DNS rebinding) gains nothing. Every redirect is looked at
again. No proxy, no cookies, no credentials.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
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
    connection, path = _connect(url, deadline)
    try:
        connection.request("GET", path, headers={"User-Agent": "clover", "Accept": "image/*"})
        response = connection.getresponse()
        location = response.getheader("location")
        if response.status in (301, 302, 303, 307, 308) and location:
            return location
        if response.status != 200:
            raise CloverError(f"the image's address answers {response.status}")
        return _body(response, connection, max_bytes=max_bytes, deadline=deadline)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise CloverError(
            f"the image cannot be fetched ({type(error).__name__}); send it as a data URI"
        ) from error
    finally:
        connection.close()


def _body(
    response: http.client.HTTPResponse,
    connection: http.client.HTTPConnection,
    *,
    max_bytes: int,
    deadline: float,
) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise CloverError("the image's address is too slow; send it as a data URI")
        if connection.sock is not None:
            connection.sock.settimeout(left)
        part = response.read1(_CHUNK)
        if not part:
            return b"".join(parts)
        parts.append(part)
        size += len(part)
        if size > max_bytes:
            raise CloverError(f"the image has more than {max_bytes:,} bytes; send a smaller one")


def _connect(url: str, deadline: float) -> tuple[http.client.HTTPConnection, str]:
    """Return a connection to the address that was looked at, and the path to ask for."""
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
    port = port or (443 if parts.scheme == "https" else 80)
    address = public_address(host, port)
    left = max(0.1, deadline - time.monotonic())
    connection: http.client.HTTPConnection
    try:
        connected = socket.create_connection((address, port), timeout=left)
        if parts.scheme == "https":
            context = ssl.create_default_context()
            connected = context.wrap_socket(connected, server_hostname=host)
            connection = http.client.HTTPSConnection(host, port, timeout=left)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=left)
    except OSError as error:
        raise CloverError(
            f"the image cannot be fetched ({type(error).__name__}); send it as a data URI"
        ) from error
    connection.sock = connected
    return connection, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


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
