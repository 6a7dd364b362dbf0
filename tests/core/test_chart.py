"""The charts' arithmetic: where things are drawn."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from clover.core.chart import (
    Bar,
    Series,
    bar_chart,
    histogram,
    line_chart,
    standalone,
    ticks,
)


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


def test_a_chart_with_intervals_and_places_stands_by_itself() -> None:
    names = ["CLOVER", "CLOVER and probe", "without instructions", "linear probe"]
    series = [
        Series(name, [(0, 80.0), (1, 90.0)], [(70.0 + at, 85.0), (85.0, 95.0)])
        for at, name in enumerate(names)
    ]
    svg = standalone(
        line_chart(series, title="t", x_label="x", y_label="y", places=["1", "32"], floor=60)
    )
    root = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg" and "var(" not in svg
    texts = [str(text.text) for text in root.iter(f"{space}text")]
    assert {"1", "32", "60", "100", *names} <= set(texts) and "0" not in texts
    spread = [line for line in root.iter(f"{space}line") if "spread" in line.attrib["class"]]
    assert len(spread) == 8
    line = next(root.iter(f"{space}polyline")).attrib["points"]
    x, y = map(float, line.split()[0].split(","))
    assert float(spread[0].attrib["x1"]) == x
    low, high = (float(spread[0].attrib[end]) for end in ("y1", "y2"))
    # Ten points below and five above, on one scale.
    assert abs((low - y) / (y - high) - 2) < 0.02
    # The legend has two rows, none beyond the edge, and the axes lie below it.
    keys = [text for text in root.iter(f"{space}text") if text.attrib["class"] == "label"]
    assert len({key.attrib["y"] for key in keys}) == 2
    assert max(float(key.attrib["x"]) + 7 * len(str(key.text)) for key in keys) < 460
    assert high > max(float(key.attrib["y"]) for key in keys)
