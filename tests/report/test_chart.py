"""The charts' arithmetic: where things are drawn, and numbers as text."""

from __future__ import annotations

import re

import pytest

from clover.report.chart import Bar, Series, bar_chart, histogram, line_chart, ticks
from clover.report.example import judge
from clover.report.figure import decimal, dollars, duration, parameters, signed


def boxes(svg: str, kind: str = "bar") -> list[tuple[float, float, float, float]]:
    found = re.findall(
        rf'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)" class="{kind}', svg
    )
    return [(float(a), float(b), float(c), float(d)) for a, b, c, d in found]


def test_ticks_are_round_and_span_the_values() -> None:
    assert ticks(100, count=4) == [0, 25, 50, 75, 100]
    assert ticks(9.3) == [0, 2, 4, 6, 8, 10]
    assert len(set(ticks(0))) > 1, "an axis of nought has a length too"
    low, *_, high = ticks(12, low=-7)
    assert low <= -7 and high >= 12


def test_a_bar_is_as_long_as_its_value() -> None:
    drawn = boxes(bar_chart([Bar("a", 80.0), Bar("b", 40.0)], title="t", limit=100))
    assert drawn[0][2] == pytest.approx(2 * drawn[1][2], abs=0.2)


def test_whiskers_stand_at_the_intervals_ends() -> None:
    svg = bar_chart([Bar("a", 50.0, 40.0, 60.0)], title="t", limit=100)
    x, _, width, _ = boxes(svg)[0]
    low, high = re.findall(r'x1="([\d.]+)" y1="[\d.]+" x2="([\d.]+)"[^>]*whisker', svg)[0]
    assert float(low) == pytest.approx(x + 0.8 * width, abs=0.2)
    assert float(high) == pytest.approx(x + 1.2 * width, abs=0.2)


def test_a_line_goes_through_its_points_from_left_to_right() -> None:
    svg = line_chart(
        [Series("loss", [(0, 10), (5, 5), (10, 0)])], title="t", x_label="x", y_label="y"
    )
    (points,) = re.findall(r'points="([^"]+)"', svg)
    (x0, y0), (x1, y1), (x2, y2) = ([float(v) for v in p.split(",")] for p in points.split())
    assert x0 < x1 < x2 and y0 < y1 < y2
    assert (x1 - x0, y1 - y0) == (pytest.approx(x2 - x1), pytest.approx(y2 - y1))


def test_a_line_of_one_point_is_seen() -> None:
    svg = line_chart([Series("loss", [(3, 10)])], title="t", x_label="x", y_label="y")
    (points,) = re.findall(r'points="([^"]+)"', svg)
    assert len(set(points.split())) == 2


def test_a_line_of_very_many_points_is_thinned() -> None:
    many = [(float(x), 1.0) for x in range(10_000)]
    svg = line_chart([Series("loss", many)], title="t", x_label="x", y_label="y")
    (points,) = re.findall(r'points="([^"]+)"', svg)
    assert 200 < len(points.split()) <= 300


def test_a_histogram_counts_every_value_once() -> None:
    svg = histogram([1, 1, 1, 2, 50], title="t", x_label="words")
    counts = [int(count) for count in re.findall(r"<title>[\d to]+: (\d+)</title>", svg)]
    assert sum(counts) == 5 and counts[0] == 4


def test_nothing_to_draw_is_no_chart() -> None:
    assert not bar_chart([], title="t")
    assert not histogram([], title="t", x_label="x")
    assert not line_chart([Series("a", [])], title="t", x_label="x", y_label="y")


def test_a_name_cannot_leave_its_chart() -> None:
    svg = bar_chart([Bar('"><script>', 1.0)], title='" onload="x')
    assert "<script" not in svg and 'onload="x' not in svg


def test_numbers_as_text() -> None:
    assert (decimal(1234.56), decimal(-0.04), decimal(-3.21), decimal(float("nan"))) == (
        "1,234.6",
        "0.0",
        "−3.2",
        "–",
    )
    assert (signed(3.2), signed(-3.2), signed(0.01), signed(None)) == ("+3.2", "−3.2", "0.0", "–")
    assert (duration(48.31), duration(492), duration(11_100)) == (
        "48.3 s",
        "8 min 12 s",
        "3 h 05 min",
    )
    assert (dollars(0), dollars(0.0042), dollars(12.3), dollars("x")) == (
        "$0",
        "$0.0042",
        "$12.30",
        "–",
    )
    assert (parameters(9_412_224), parameters(None)) == ("9.41 M", "–")


@pytest.mark.parametrize(
    ("kind", "answer", "prediction", "expected"),
    [
        ("closed", "yes", "Yes, there is.", "right"),
        ("closed", "no", "Yes, there is no doubt.", "wrong"),
        ("closed", "no", "perhaps", "wrong"),
        ("open", "colonic mucosa", "Mucosa, colonic.", "right"),
        ("open", "colonic mucosa", "gastric mucosa", "part"),
        ("open", "liver", "", "wrong"),
        ("open", "", "liver", "wrong"),
        ("open", "liver", None, "wrong"),
    ],
)
def test_an_example_is_sorted_by_the_words_of_the_truth(
    kind: str, answer: str, prediction: str | None, expected: str
) -> None:
    row = {"answer_type": kind, "answer": answer, "prediction": prediction}
    assert judge(row).kind == expected
