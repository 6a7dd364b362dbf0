"""How a run went: losses of both stages, what alignment reached, where time and money went."""

from __future__ import annotations

from statistics import median
from typing import Any

from markupsafe import Markup

from clover.core.chart import Bar, Series, bar_chart, line_chart
from clover.report.figure import decimal, dollars, duration, number
from clover.report.reading import Row, Run

_LOSSES = {
    "align": {"loss": "sum", "contrast": "contrast", "match": "match", "caption": "caption"},
    "ground": {"loss": "loss a visual token"},
    "anchor": {"loss": "loss a visual token, with distance"},
    "tune": {"loss": "answer loss"},
}
_TITLES = {
    "align": "Stage 1: align",
    "ground": "Stage 2, before the language model: visual tokens spell the answer",
    "anchor": "Stage 2, before the language model: visual tokens move onto words",
    "tune": "Stage 2: tune, through the language model",
}
_RETRIEVAL = {
    "image_to_text_recall_1": "image to text, recall@1",
    "image_to_text_recall_5": "image to text, recall@5",
    "text_to_image_recall_1": "text to image, recall@1",
    "text_to_image_recall_5": "text to image, recall@5",
    "matching_accuracy": "own pair told from wrong ones",
}


def loss_charts(run: Run) -> list[dict[str, Any]]:
    """Return a chart with its caption for each training stage that was logged."""
    charts = []
    for stage, names in _LOSSES.items():
        rows = [row for row in run.metrics if row.get("stage") == stage]
        series = [Series(name, _points(rows, key)) for key, name in names.items()]
        chart = line_chart(series, title=_TITLES[stage], x_label="step", y_label="loss")
        if chart:
            caption = _caption(rows, series[0])
            if stage == "anchor":
                caption += _refit(run)
            charts.append({"title": _TITLES[stage], "chart": chart, "caption": caption})
    return charts


def _points(rows: list[Row], key: str) -> list[tuple[float, float]]:
    found = [(number(row.get("step")), number(row.get(key))) for row in rows]
    return sorted((x, y) for x, y in found if x is not None and y is not None)


def _caption(rows: list[Row], total: Series) -> str:
    said = []
    if total.points:
        (_, first), (steps, last) = total.points[0], total.points[-1]
        said.append(f"{steps:,.0f} steps, loss {decimal(first, 2)} to {decimal(last, 2)}")
    seconds = [value for row in rows if (value := number(row.get("seconds_per_step"))) is not None]
    if seconds:
        said.append(f"median {decimal(median(seconds), 2)} s a step")
    rates = [value for row in rows if (value := number(row.get("learning_rate"))) is not None]
    if rates:
        said.append(f"peak learning rate {max(rates):.1e}")
    return "; ".join(said)


def _refit(run: Run) -> str:
    """Return how well the projection, fitted in one go before these steps, meets the words."""
    shares = [row.get("explained_variance") for row in run.metrics if row.get("stage") == "refit"]
    share = number(shares[-1]) if shares else None
    if share is None:
        return ""
    return f"; from a projection fitted to {decimal(100 * share)} % of the words' variance"


def alignment_rows(run: Run) -> list[tuple[str, str]]:
    """Return what stage 1 reached among held-out pairs, in percent."""
    return [
        (name, decimal(run.alignment.get(key)))
        for key, name in _RETRIEVAL.items()
        if number(run.alignment.get(key)) is not None
    ]


def stages(run: Run) -> list[Row]:
    """Return the bill's entries."""
    found = run.costs.get("stages")
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def time_chart(run: Run) -> Markup:
    """Draw the seconds of each stage."""
    bars = [
        Bar(str(row.get("stage", "?")), seconds, text=duration(seconds))
        for row in stages(run)
        if (seconds := number(row.get("seconds"))) is not None
    ]
    return bar_chart(bars, title="seconds by stage")


def bill_rows(run: Run) -> list[dict[str, str]]:
    """Return a line a stage: time, its share, dollars, peak memory."""
    rows = stages(run)
    total = sum(number(row.get("seconds")) or 0.0 for row in rows) or 1.0
    return [
        {
            "stage": str(row.get("stage", "?")),
            "time": duration(row.get("seconds")),
            "share": f"{decimal(100 * (number(row.get('seconds')) or 0.0) / total)} %",
            "dollars": dollars(row.get("dollars")),
            "memory": decimal(row.get("peak_memory_gib"), 2),
        }
        for row in rows
    ]


def peak_memory(run: Run) -> str:
    """Return the largest memory of any stage in GiB."""
    found = [number(row.get("peak_memory_gib")) for row in stages(run)]
    return decimal(max((value for value in found if value is not None), default=None), 2)
