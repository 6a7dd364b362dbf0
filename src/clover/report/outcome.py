"""What a run reached: the paper-shaped row, the controls, and the table of question forms."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from clover.core.chart import Bar, bar_chart
from clover.report.figure import Figure, decimal, dollars, duration, number, parameters, signed
from clover.report.reading import Run, part, title

_VIEWS = {
    "image": "with the image",
    "blind": "without an image",
    "shuffled": "another image",
    "noise": "noise image",
}
_BASELINES = {
    "linear_probe": "linear probe",
    "colour_only": "colour alone",
    "question_only": "question alone",
    "majority": "commonest answer",
}
_FORM_COLUMNS = ("blind", "probe", "colour", "majority")
_KINDS = {"closed": "closed", "open": "open_recall"}


def gain(run: Run, kind: str) -> Figure:
    """Return the image gain of `closed` or `open` questions: points over the blind answers."""
    gains = part(run.details, "gains")
    found = Figure.read(part(gains, "blind").get(kind) or gains.get(kind))
    if found.value is None:
        return Figure(number(run.scores.get(f"image_gain_{kind}")))
    return found


def score(run: Run, kind: str, view: str = "image") -> Figure:
    """Return closed accuracy or open recall of a view, in percent."""
    found = Figure.read(part(run.details, "views", view).get(_KINDS[kind]))
    if found.value is None and view == "image":
        return Figure(
            number(run.scores.get(_KINDS[kind])), count=_count(run.scores.get(f"num_{kind}"))
        )
    return found


def _count(value: Any) -> int | None:
    found = number(value)
    return None if found is None else int(found)


def trainable(run: Run) -> str:
    """Return how many parameters were trained, as ``9.41 M``."""
    count = run.details.get("trainable_parameters") or run.config.get("trainable_parameters")
    return parameters(count)


def spent(run: Run) -> tuple[str, str]:
    """Return the time and the dollars of the whole run; of the evaluation alone without a bill."""
    total = part(run.costs, "total")
    return (
        duration(total.get("seconds", run.scores.get("seconds"))),
        dollars(total.get("dollars", run.scores.get("dollars"))),
    )


def table_row(run: Run) -> dict[str, Any]:
    """Return a run's line of the paper-shaped table."""
    divided = part(run.details, "per_log_parameters")
    seconds, money = spent(run)
    return {
        "run": run.name,
        "model": title(run),
        "trainable": trainable(run),
        "closed": score(run, "closed"),
        "closed_divided": decimal(divided.get("closed"), 2),
        "open": score(run, "open"),
        "open_divided": decimal(divided.get("open_recall"), 2),
        "gain_closed": gain(run, "closed"),
        "gain_open": gain(run, "open"),
        "seconds": seconds,
        "dollars": money,
    }


def tiles(run: Run) -> list[dict[str, str]]:
    """Return the figures that open a run's part of the page, without those nobody knows."""
    seconds, money = spent(run)
    closed, open_ = gain(run, "closed"), gain(run, "open")
    found = [
        _tile("closed accuracy, %", score(run, "closed")),
        _tile("open recall, %", score(run, "open")),
        {
            "name": "image gain, points",
            "value": f"{closed.signed} / {open_.signed}",
            "note": "closed / open, over the same questions without an image",
        },
        {"name": "trainable parameters", "value": trainable(run), "note": "the rest is frozen"},
        {"name": "time and money", "value": f"{seconds}, {money}", "note": "all stages together"},
    ]
    return [tile for tile in found if any(letter.isdigit() for letter in tile["value"])]


def _tile(name: str, figure: Figure) -> dict[str, str]:
    notes = [f"95 %: {figure.interval}"] if figure.interval else []
    if figure.count:
        notes.append(f"{figure.count:,} questions")
    return {"name": name, "value": figure.text, "note": ", ".join(notes)}


def control_chart(run: Run, kind: str) -> Markup:
    """Draw a kind's score with the image beside what is reached without looking."""
    bars = []
    for view, name in _VIEWS.items():
        found = score(run, kind, view)
        if found.value is not None:
            bars.append(_bar(name, found, is_main=view == "image"))
    for baseline, name in _BASELINES.items():
        figures = part(run.details, "baselines", baseline)
        # Baselines without words to recall are counted by exact answers.
        exact = kind == "open" and figures.get("open_recall") is None
        found = Figure.read(figures.get("open_exact" if exact else _KINDS[kind]))
        if found.value is not None:
            bars.append(_bar(name + " (exact)" * exact, found))
    measure = "closed accuracy" if kind == "closed" else "open recall"
    return bar_chart(bars, title=f"{measure}, percent", limit=100)


def _bar(name: str, figure: Figure, *, is_main: bool = False) -> Bar:
    assert figure.value is not None, "a bar stands for a number"
    return Bar(name, figure.value, figure.low, figure.high, figure.text, is_main)


def form_rows(run: Run) -> list[dict[str, Any]]:
    """Return a line for each question form, closed ones first, the worst first among them."""
    rows = []
    for name, found in part(run.details, "forms").items():
        if not isinstance(found, dict):
            continue
        image, blind = number(found.get("image")), number(found.get("blind"))
        kind = str(found.get("type", ""))
        rows.append(
            {
                "form": name.removesuffix(f" ({kind})").replace("_", " "),
                "type": kind,
                "n": decimal(found.get("n"), 0),
                "image": image,
                "gain": "–" if image is None or blind is None else signed(image - blind),
                **{
                    key: decimal(found.get(key)) for key in ("blind", "probe", "colour", "majority")
                },
                "image_text": decimal(image),
            }
        )
    return sorted(rows, key=lambda row: (row["type"], row["image"] or 0.0))


def notes(run: Run) -> list[str]:
    """Return what else belongs beside the scores: rule, sample sizes, bias towards yes."""
    details, said = run.details, []
    if details.get("protocol"):
        said.append(f"rule: {details['protocol']}; intervals: 95 %")
    for key, text in (
        ("base_rate", "of the closed questions have the truth yes"),
        ("yes_rate", "are answered yes"),
        ("unparsed", "of the closed answers hold neither yes nor no, and count as wrong"),
    ):
        if number(details.get(key)) is not None:
            said.append(f"{decimal(details[key])} % {text}")
    if part(details, "baselines", "linear_probe"):
        said.append("linear probe: a linear classifier for each form, on the same frozen features")
    fewer = []
    for view in ("shuffled", "noise"):
        counts = [score(run, kind, view).count for kind in _KINDS]
        if any(counts):
            fewer.append(f"{_VIEWS[view]} {sum(count or 0 for count in counts):,}")
    if fewer:
        said.append("questions in the controls: " + ", ".join(fewer))
    return said
