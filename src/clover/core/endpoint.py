"""The way to an OpenAI-compatible endpoint: one request out, one reply or one named error back.

Whoever speaks to an endpoint goes this way, so that its rules hold everywhere: what is addressed
to this machine meets no proxy, nothing follows a redirect to an address that the user did not
name, and a key is needed elsewhere only. Retries and bookkeeping are the caller's; this file knows
HTTP's ways of going wrong.
"""

from __future__ import annotations

import ipaddress
import itertools
import os
import random
from dataclasses import dataclass
from typing import Any, TypeGuard
from urllib.parse import urlsplit

from clover.core.errors import CloverError

MOST_TOKENS = 2**31
"""No request counts so many: an endpoint that says so has not counted."""
_MAX_RETRY_AFTER = 120.0
_CONNECTIONS_EACH = 8


class Refused(Exception):
    """The endpoint answered with an error: nothing is owed; asking again may help."""

    def __init__(self, note: str, *, retry_after: float | None = None) -> None:
        super().__init__(note)
        self.retry_after = retry_after


class Declined(Exception):
    """The endpoint will not answer this request, however often it is asked."""


class Lost(Exception):
    """The request left and no whole reply came back: it may have been paid for."""


class Unusable(Exception):
    """A reply came, was paid for, and is not one: wrong model, cut off, no pairs."""


@dataclass(frozen=True)
class Reply:
    """A model's answer with the tokens that the endpoint counted, if it counted."""

    text: str
    finish_reason: str
    model: str
    tokens: tuple[int, int] | None


def check_endpoint(endpoint: str) -> str:
    """Return an endpoint's URL in the form the client wants.

    Raises:
        CloverError: not an http or https URL with a host and, if any, a port up to 65535.
    """
    url = endpoint.strip()
    if not _is_web_address(url):
        raise CloverError(
            f"--endpoint '{endpoint}' is not a URL such as http://127.0.0.1:8000/v1; nothing sent"
        )
    return url.rstrip("/").removesuffix("/chat/completions")


def _is_web_address(url: str) -> bool:
    import httpx2

    try:
        parts = urlsplit(url)
        # What else would be found out only in sending, by the client and by the look-up of names.
        host = httpx2.URL(url).host.encode("idna")
        has_port = parts.port is None or parts.port > 0
    except (ValueError, httpx2.InvalidURL):
        return False
    is_one_word = len(url.split()) == 1
    return bool(host) and has_port and is_one_word and parts.scheme in ("http", "https")


def is_loopback(endpoint: str) -> bool:
    """Say whether an endpoint is on this machine."""
    host = urlsplit(endpoint).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def find_key(endpoint: str, variable: str) -> str:
    """Return the API key from the environment; an endpoint on this machine needs none.

    Raises:
        CloverError: no key for an endpoint elsewhere, or one that no header can carry.
    """
    key = os.environ.get(variable, "").strip()
    wrong = next((n for n, letter in enumerate(key, 1) if not "!" <= letter <= "~"), None)
    if wrong is not None:
        raise CloverError(
            f"{variable} is no API key: its character {wrong} of {len(key)} is a space, a line "
            "break or not ASCII; export it anew; nothing sent"
        )
    if key:
        return key
    if is_loopback(endpoint):
        return "none"
    raise CloverError(
        f"{variable} is not set and {endpoint} is not on this machine; export {variable}=..., "
        "or name another variable with --key-env; nothing sent"
    )


def http_client(endpoint: str, *, is_plain_local: bool = False) -> Any:
    """Return the HTTP client that the official client is to use for an endpoint.

    Args:
        endpoint: Its URL.
        is_plain_local: Whether to take the quicker way to this machine, which does not stream.

    Raises:
        CloverError: the environment names a proxy that cannot be used.
    """
    from openai import DefaultAsyncHttpxClient

    if is_plain_local:
        from clover.core.transport import LocalTransport

        return DefaultAsyncHttpxClient(
            transport=LocalTransport(), trust_env=False, follow_redirects=False
        )
    # A proxy from the environment must not carry what was addressed to this machine; and plain
    # http needs no certificates, which take longer to load than to be used.
    is_https = endpoint.startswith("https")
    try:
        return DefaultAsyncHttpxClient(
            trust_env=not is_loopback(endpoint), verify=is_https, follow_redirects=False
        )
    except ImportError as error:  # its own advice names another package than the one it imports
        raise CloverError(
            "the environment names a SOCKS proxy (ALL_PROXY, HTTPS_PROXY), which needs the package "
            "socksio; pip install socksio, or unset the variable; nothing sent"
        ) from error
    except ValueError as error:
        raise CloverError(
            f"the environment names a proxy that is none (ALL_PROXY, HTTPS_PROXY, HTTP_PROXY): "
            f"{error}; mend or unset the variable; nothing sent"
        ) from error


class Client:
    """Sends chat requests; use it as an async context manager."""

    def __init__(self, endpoint: str, *, key: str, timeout_s: float, concurrency: int = 1) -> None:
        from openai import AsyncOpenAI

        self.endpoint = endpoint
        is_plain_local = is_loopback(endpoint) and endpoint.startswith("http:")
        # A pool looks through all its connections at every request: several small are quicker.
        pools = 1 if is_plain_local else -(-concurrency // _CONNECTIONS_EACH)
        self._clients = [
            AsyncOpenAI(
                api_key=key,
                base_url=endpoint,
                timeout=timeout_s,
                max_retries=0,
                http_client=http_client(endpoint, is_plain_local=is_plain_local),
            )
            for _ in range(pools)
        ]
        self._turn = itertools.cycle(self._clients)
        self._limit_field = "max_tokens"

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self._clients:
            await client.close()

    @property
    def openai(self) -> Any:
        """The official client, for files and batches."""
        return self._clients[0]

    async def send(self, body: dict[str, Any]) -> Reply:
        """Send one chat request.

        Raises:
            CloverError: the key is not accepted, there is no money, no such address or model, or
                the request cannot be written as JSON and never left.
            Refused: the endpoint is busy or broken for now.
            Declined: the endpoint finds fault with this request.
            Lost: the connection broke or timed out after the request had left.
        """
        import openai

        try:
            response = await self._create(body)
        except openai.APIStatusError as error:
            raise self._status_error(error) from error
        except openai.APITimeoutError as error:
            raise Lost("no reply in time") from error
        except openai.APIConnectionError as error:
            cause = type(error.__cause__).__name__
            if "Connect" in cause:
                raise Refused(f"cannot connect to {self.endpoint} ({cause})") from error
            raise Lost(f"the connection broke ({cause})") from error
        except openai.APIError as error:
            raise Lost(f"the reply cannot be read ({type(error).__name__})") from error
        except ValueError as error:
            # Sending wraps its errors; a bare one is of building the request.
            raise CloverError(f"the request cannot be built ({error}); nothing sent") from error
        return read_reply(_json(response))

    async def _create(self, body: dict[str, Any]) -> Any:
        import openai

        try:
            return await self._post(body)
        except openai.BadRequestError as error:
            # Newer models know the limit under another name, and say so.
            if "max_completion_tokens" not in str(error.message) or "max_tokens" not in body:
                raise
            self._limit_field = "max_completion_tokens"
            return await self._post(body)

    async def _post(self, body: dict[str, Any]) -> Any:
        import httpx2

        # The client's own way to endpoints it does not know: `chat.completions.create` walks
        # through every message by its type annotations, which costs more than all the rest.
        named = self._named(body)
        client = next(self._turn)
        return await client.post("/chat/completions", cast_to=httpx2.Response, body=named)

    def _named(self, body: dict[str, Any]) -> dict[str, Any]:
        return {self._limit_field if k == "max_tokens" else k: v for k, v in body.items()}

    def _status_error(self, error: Any) -> Exception:
        status, message = error.status_code, _message(error)
        if status == 401:
            return CloverError(f"{self.endpoint} does not accept the API key ({status}: {message})")
        if status in (404, 405) or 300 <= status < 400:
            text = f"{self.endpoint} has no such address or model ({status}: {message})"
            return CloverError(f"{text}; the address usually ends in /v1")
        if status == 402 or (status == 429 and error.code == "insufficient_quota"):
            return CloverError(
                f"{self.endpoint}: the account has no money left ({message}); "
                "what arrived is kept, the same command continues"
            )
        if status in (408, 409, 425, 429) or status >= 500:
            return Refused(f"{status}: {message}", retry_after=retry_after(error.response.headers))
        return Declined(f"{status}: {message}")


def _message(error: Any) -> str:
    return " ".join(whole_text(error.message).split())[:160]


def _json(response: Any) -> Any:
    """Return the parsed JSON of a reply that arrived, or None where it claims to be none.

    Raises:
        Lost: it is not whole JSON.
    """
    if "json" not in response.headers.get("content-type", ""):
        return None
    try:
        return response.json()
    except (ValueError, RecursionError) as error:
        raise Lost(f"the reply is not whole JSON ({type(error).__name__})") from error


def pause_s(error: BaseException | None, attempt: int, longest: float) -> float:
    """Return the seconds until the next attempt: what the endpoint asks for, or a guess.

    Args:
        error: Why the last one failed.
        attempt: Its number, from 1.
        longest: Of a guess.
    """
    if isinstance(error, Refused) and error.retry_after is not None:
        # A little apart, or all would come back in the same instant.
        return error.retry_after + random.uniform(0, 0.25)
    most = min(longest, 0.5 * 2.0**attempt)
    return random.uniform(most / 2, most)


def retry_after(headers: Any) -> float | None:
    """Return the seconds that a Retry-After header asks for, at most two minutes."""
    from email.utils import parsedate_to_datetime
    from time import time

    text = headers.get("retry-after-ms")
    try:
        if text is not None:
            return min(max(float(text) / 1000, 0.0), _MAX_RETRY_AFTER)
        text = headers.get("retry-after")
        if text is None:
            return None
        try:
            seconds = float(text)
        except ValueError:
            seconds = parsedate_to_datetime(text).timestamp() - time()
    except (ValueError, TypeError):
        return None
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER)


def read_reply(raw: Any) -> Reply:
    """Read a chat reply; what an endpoint leaves out is missed without a crash.

    Args:
        raw: The parsed JSON of the reply.

    Raises:
        Lost: it is no chat reply at all.
    """
    reply = raw if isinstance(raw, dict) else {}
    choice = _first(reply.get("choices"))
    message = choice.get("message")
    if not isinstance(message, dict):
        raise Lost("the reply holds no answer")
    return Reply(
        text=whole_text(message.get("content") or ""),
        finish_reason=whole_text(choice.get("finish_reason") or "stop"),
        model=whole_text(reply.get("model") or ""),
        tokens=_tokens(reply.get("usage")),
    )


def _tokens(usage: Any) -> tuple[int, int] | None:
    """Return the tokens in and out that an endpoint counted; None where that is no count."""
    counted = usage if isinstance(usage, dict) else {}
    inputs, outputs = counted.get("prompt_tokens"), counted.get("completion_tokens")
    return (inputs, outputs) if _is_count(inputs) and _is_count(outputs) else None


def _is_count(value: Any) -> TypeGuard[int]:
    # True is an int to Python; and what is negative would pay back.
    return type(value) is int and 0 <= value < MOST_TOKENS


def whole_text(value: Any) -> str:
    """Return what an endpoint wrote as text that can be stored.

    JSON may hold half of a surrogate pair, which neither a file nor a database takes; it becomes
    the replacement character.
    """
    return str(value).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _first(choices: Any) -> dict[str, Any]:
    found = choices[0] if isinstance(choices, list) and choices else None
    return found if isinstance(found, dict) else {}
