"""Small charts as inline SVG: lines, bars with interval whiskers, histograms.

chart.css colours them by class: on a page they follow its light and dark, and `standalone` makes a
file of one. A series is told by its dashes too, never by colour alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from markupsafe import Markup

_WIDTH = 460
"""Drawn width in pixels; narrow, so that a phone shows its text at a size that can be read."""
_HEIGHT = 250
_CHARACTER = 7.0
"""Mean width of a character of the 12 px labels."""
_MOST_POINTS = 300


@dataclass(frozen=True)
class Series:
    """One line of a chart: a name, and points in the order of x."""

    name: str
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float]] = ()
    """Lowest and highest y of each point; drawn where there are any."""


@dataclass(frozen=True)
class Bar:
    """One bar: a label, a value, its interval and the text behind it."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    text: str = ""
    is_main: bool = False


def ticks(high: float, *, low: float = 0.0, count: int = 5) -> list[float]:
    """Return about `count` round numbers that span `low` to `high`."""
    span = max(high - low, 1e-9)
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    places: Sequence[str] = (),
    floor: float = 0.0,
) -> Markup:
    """Draw lines over common axes with a legend.

    Args:
        series: The lines.
        title: For readers who cannot see the chart.
        x_label: Below the x axis.
        y_label: Beside the y axis.
        places: What stands at x = 0, 1, 2, ... where x only counts; else x is measured.
        floor: Where the y axis begins, if no point lies below.

    Returns:
        An SVG element; empty when no series has a point.
    """
    shown = [
        item if item.intervals else Series(item.name, _thin(item.points))
        for item in series
        if item.points
    ]
    if not shown:
        return Markup()
    every = [y for item in shown for pair in (*item.points, *_ends(item)) for y in pair[1:]]
    x_ticks, names = _x_ticks(shown, places)
    y_ticks = ticks(max(every), low=min(floor, *every))
    left, right = 48, _WIDTH - 16
    legend, rows = _legend([item.name for item in shown], left, right)
    top, bottom = 34 + 18 * (rows - 1), _HEIGHT - 40 + 18 * (rows - 1)
    margin = 14 if places else 0
    x_at = _scale(x_ticks[0], x_ticks[-1], left + margin, right - margin)
    y_at = _scale(y_ticks[0], y_ticks[-1], bottom, top)
    parts = [_horizontal_grid(y_ticks, y_at, left, right)]
    parts += [
        _text(x_at(x), bottom + 17, name, "tick", "middle")
        for x, name in zip(x_ticks, names, strict=True)
    ]
    parts.append(_text((left + right) / 2, bottom + 34, x_label, "axis", "middle"))
    parts.append(_text(12, (top + bottom) / 2, y_label, "axis", "middle", is_turned=True))
    has_spread = any(item.intervals for item in shown)
    for index, item in enumerate(shown):
        # Intervals of several lines stand side by side, not on one another.
        shift = 2.5 * (index - (len(shown) - 1) / 2) if has_spread else 0.0
        drawn = [(x_at(x) + shift, y_at(y)) for x, y in item.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
        if len(drawn) == 1:  # a line of one point cannot be seen
            path += f" {drawn[0][0] - 6:.1f},{drawn[0][1]:.1f}"
        name = f"{item.name}: {item.points[0][1]:.3g} to {item.points[-1][1]:.3g}"
        parts.append(
            Markup('<polyline class="line s{}" points="{}"><title>{}</title></polyline>').format(
                index % 6, path, name
            )
        )
        parts += [
            _stroke(x, y_at(low), x, y_at(high), f"s{index % 6} spread")
            for (x, _), (low, high) in zip(drawn, item.intervals, strict=False)
        ]
    parts.append(legend)
    ends = "; ".join(
        f"{item.name} from {item.points[0][1]:.3g} to {item.points[-1][1]:.3g}" for item in shown
    )
    return _svg(parts, height=bottom + 40, label=f"{title}: {ends}")


def _ends(item: Series) -> list[tuple[float, ...]]:
    return [(0.0, low, high) for low, high in item.intervals]


def _x_ticks(shown: Sequence[Series], places: Sequence[str]) -> tuple[list[float], list[str]]:
    """Return where the x axis has a tick, and its text."""
    if places:
        return [float(place) for place in range(len(places))], list(places)
    every = [x for item in shown for x, _ in item.points]
    found = ticks(max(every), low=min(0.0, *every, 0.0))
    return found, [_tick(x) for x in found]


_COLOURS = {
    "ink": "#1c2430",
    "muted": "#5b6673",
    "rule": "#d5dbe2",
    "card": "#ffffff",
    "plain": "#9aa7b4",
    "s0": "#0068a8",
    "s1": "#c94f00",
    "s2": "#007a5a",
    "s3": "#a3478b",
    "s4": "#8a6d00",
    "s5": "#4b5563",
}


def standalone(svg: Markup) -> str:
    """Return a chart as a file of its own, in light colours, for readers that know no variables."""
    rules = files("clover.core").joinpath("chart.css").read_text("utf-8")
    style = re.sub(r"var\(--(\w+)\)", lambda name: _COLOURS[name[1]], rules)
    style += ".chart { font-family: system-ui, sans-serif; background: #ffffff; }\n"
    start, end = svg.split(">", 1)
    return f'{start} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{end}\n'


def bar_chart(
    bars: Sequence[Bar], *, title: str, limit: float | None = None, unit: str = ""
) -> Markup:
    """Draw bars from the left, one a row, with their intervals as whiskers.

    Args:
        bars: The rows, from the top.
        title: For readers who cannot see the chart.
        limit: Right end of the axis; without one the longest bar decides.
        unit: Stands after each tick of the axis.

    Returns:
        An SVG element; empty when there are no bars.
    """
    if not bars:
        return Markup()
    longest = max(max(bar.value, bar.high or bar.value) for bar in bars)
    marks = ticks(limit if limit is not None else max(longest, 1e-9), count=4)
    least = min(min(bar.value, bar.low or bar.value, 0.0) for bar in bars)
    if least < 0:
        marks = ticks(marks[-1], low=least, count=4)
    left = 10 + min(205.0, _CHARACTER * max(len(bar.label) for bar in bars) + 4)
    right = _WIDTH - 14 - _CHARACTER * max(len(bar.text) for bar in bars)
    row, top = 27, 6
    bottom = top + row * len(bars)
    x_at = _scale(marks[0], marks[-1], left, right)
    parts = [_vertical_grid(marks, x_at, (top, bottom), unit)]
    parts += [
        _bar_row(bar, x_at, left, top + row * index + row / 2) for index, bar in enumerate(bars)
    ]
    said = "; ".join(f"{bar.label} {bar.text or f'{bar.value:g}'}" for bar in bars)
    return _svg(parts, height=bottom + 26, label=f"{title}: {said}")


def histogram(values: Sequence[float], *, title: str, x_label: str) -> Markup:
    """Draw how often each length occurs, in bins of whole numbers.

    Returns:
        An SVG element; empty when there are no values.
    """
    if not values:
        return Markup()
    low, high = math.floor(min(values)), math.floor(max(values))
    size = max(1, math.ceil((high - low + 1) / 24))
    counts = [0] * ((high - low) // size + 1)
    for value in values:
        counts[(math.floor(value) - low) // size] += 1
    y_ticks = ticks(max(counts), count=3)
    left, right, top, bottom = 48, _WIDTH - 16, 12, 150
    slot = (right - left) / max(len(counts), 8)
    y_at = _scale(0, y_ticks[-1], bottom, top)
    parts = [_horizontal_grid(y_ticks, y_at, left, right)]
    every = math.ceil(len(counts) / 12)
    for index, count in enumerate(counts):
        start = low + index * size
        name = f"{start}" if size == 1 else f"{start} to {start + size - 1}"
        x = left + index * slot
        parts.append(
            _box(x + 1, y_at(count), slot - 2, bottom - y_at(count), "bar", f"{name}: {count:,}")
        )
        if index % every == 0:
            parts.append(_text(x + slot / 2, bottom + 16, name.split()[0], "tick", "middle"))
    parts.append(_text((left + right) / 2, 184, x_label, "axis", "middle"))
    mean = sum(values) / len(values)
    label = f"{title}: {len(values):,} values from {low} to {high}, mean {mean:.1f}"
    return _svg(parts, height=190, label=label)


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.start + share * (self.end - self.start)


def _scale(low: float, high: float, start: float, end: float) -> _Scale:
    return _Scale(low, high, start, end)


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `_MOST_POINTS` points, each the mean of its neighbours."""
    size = math.ceil(len(points) / _MOST_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]


def _svg(parts: Sequence[Markup], *, height: float, label: str) -> Markup:
    return Markup(
        '<svg class="chart" role="img" viewBox="0 0 {} {:.0f}" aria-label="{}">{}</svg>'
    ).format(_WIDTH, height, label, Markup("").join(parts))


def _text(
    x: float, y: float, text: str, kind: str, anchor: str = "start", is_turned: bool = False
) -> Markup:
    turn = Markup(' transform="rotate(-90 {:.0f} {:.0f})"').format(x, y) if is_turned else Markup()
    return Markup('<text x="{:.1f}" y="{:.1f}" class="{}" text-anchor="{}"{}>{}</text>').format(
        x, y, kind, anchor, turn, text
    )


def _box(x: float, y: float, width: float, height: float, kind: str, title: str) -> Markup:
    return Markup(
        '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" class="{}">'
        "<title>{}</title></rect>"
    ).format(x, y, max(width, 0.5), max(height, 0.0), kind, title)


def _stroke(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup(
        '<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"></line>'
    ).format(x1, y1, x2, y2, kind)


def _tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}".replace("-", "−")


def _horizontal_grid(marks: Sequence[float], at: _Scale, left: float, right: float) -> Markup:
    lines = [_stroke(left, at(mark), right, at(mark), "grid") for mark in marks]
    names = [_text(left - 7, at(mark) + 4, _tick(mark), "tick", "end") for mark in marks]
    return Markup("").join(lines + names)


def _vertical_grid(
    marks: Sequence[float], at: _Scale, rows: tuple[float, float], unit: str
) -> Markup:
    top, bottom = rows
    lines = [_stroke(at(mark), top, at(mark), bottom, "grid") for mark in marks]
    names = [_text(at(mark), bottom + 17, _tick(mark) + unit, "tick", "middle") for mark in marks]
    return Markup("").join(lines + names)


def _bar_row(bar: Bar, at: _Scale, left: float, middle: float) -> Markup:
    room = int((left - 10) / _CHARACTER)
    label = bar.label if len(bar.label) <= room else bar.label[: room - 1] + "…"
    start, end = sorted((at(0), at(bar.value)))
    kind = "bar main" if bar.is_main else "bar"
    parts = [
        Markup("<g><title>{}</title>{}</g>").format(
            bar.label, _text(left - 8, middle + 4, label, "label", "end")
        ),
        _box(start, middle - 8, end - start, 16, kind, f"{bar.label}: {bar.text or bar.value}"),
    ]
    if bar.low is not None and bar.high is not None:
        low, high = at(bar.low), at(bar.high)
        # A pale edge first, so that a whisker is seen on a dark bar.
        for line in ("halo", "whisker"):
            parts.append(_stroke(low, middle, high, middle, line))
            parts += [_stroke(x, middle - 4, x, middle + 4, line) for x in (low, high)]
        end = max(end, high)
    parts.append(_text(end + 6, middle + 4, bar.text, "value"))
    return Markup("").join(parts)


def _legend(names: Sequence[str], left: float, right: float) -> tuple[Markup, int]:
    """Return the legend above a chart, and how many rows it takes."""
    parts, x, row = [], float(left), 0
    for index, name in enumerate(names):
        width = 29 + _CHARACTER * len(name)
        if x > left and x + width > right:
            x, row = float(left), row + 1
        y = 14 + 18 * row
        parts.append(_stroke(x, y, x + 24, y, f"line s{index % 6}"))
        parts.append(_text(x + 29, y + 4, name, "label"))
        x += width + 18
    return Markup("").join(parts), row + 1
