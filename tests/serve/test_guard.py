"""Names that the server answers to, and figures that stay whole."""

from __future__ import annotations

from collections import Counter

import pytest

from clover.serve.guard import Guard, Refusal
from clover.serve.metrics import _written
from clover.serve.settings import ServeSettings


async def nobody(*_: object) -> None:
    raise AssertionError("nothing stands behind this guard")


@pytest.mark.parametrize(
    "said", ["Slides.Hospital.org", "slides.hospital.org:8000", "SLIDES.HOSPITAL.ORG"]
)
def test_a_host_s_name_has_no_case(said: str) -> None:
    guard = Guard(nobody, ServeSettings(hosts=("Slides.Hospital.org",)), Counter())
    guard._check_host({"host": said})
    with pytest.raises(Refusal, match=r"this server is not 'evil\.example'"):
        guard._check_host({"host": "Evil.example"})


@pytest.mark.parametrize(
    ("value", "text"), [(12345678, "12345678"), (0, "0"), (1234567.25, "1234567.25"), (0.5, "0.5")]
)
def test_a_figure_keeps_its_digits(value: float, text: str) -> None:
    assert _written(value) == text


PROXIED = ServeSettings(hosts=("Clover.Hosp.de",))


def asked(settings: ServeSettings, host: str, origin: str) -> None:
    guard = Guard(nobody, settings, Counter())
    guard._check_host({"host": host})
    guard._check_origin({"host": host, "origin": origin})


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1:8771", "https://clover.hosp.de"),  # nginx, nothing said of Host
        ("clover.hosp.de", "https://clover.hosp.de:8443"),  # proxy_set_header Host $host
        ("clover.hosp.de:8443", "https://clover.hosp.de:8443"),  # and $http_host
        ("127.0.0.1:8771", "http://127.0.0.1:8771"),  # this machine, without the proxy
    ],
)
def test_a_page_of_a_named_host_asks_through_a_proxy(host: str, origin: str) -> None:
    asked(PROXIED, host, origin)


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1:8771", "https://evil.example"),
        ("127.0.0.1:8771", "https://clover.hosp.de.evil.example"),
        ("127.0.0.1:8771", "https://evil-clover.hosp.de"),
        ("clover.hosp.de", "https://evil.example"),
        ("127.0.0.1:8771", "http://127.0.0.1:3000"),  # another program's page on this machine
        ("127.0.0.1:8771", "null"),
        ("127.0.0.1:8771", "https://["),
        ("evil.example", "http://evil.example"),  # a name that was pointed here (DNS rebinding)
        ("evil.example", "https://clover.hosp.de"),
    ],
)
@pytest.mark.parametrize("hosts", [("Clover.Hosp.de",), ("clover.hosp.de", "localhost", "")])
def test_a_page_of_any_other_host_does_not(host: str, origin: str, hosts: tuple[str, ...]) -> None:
    with pytest.raises(Refusal, match=r"may not ask here|this server is not"):
        asked(ServeSettings(hosts=hosts), host, origin)


def test_without_a_name_given_a_proxied_page_is_told_what_to_give() -> None:
    with pytest.raises(Refusal, match=r"'clover\.hosp\.de' may not ask here; .*--allow-host"):
        asked(ServeSettings(), "127.0.0.1:8771", "https://clover.hosp.de")
    off_loopback = ServeSettings(host="0.0.0.0", token="secret")
    with pytest.raises(Refusal, match="may not ask here"):
        asked(off_loopback, "10.0.0.5:8771", "https://clover.hosp.de")
