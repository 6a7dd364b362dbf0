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
