"""Put a run, or several side by side, on one page that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from clover import __version__
from clover.core.errors import CloverError
from clover.core.files import write_text
from clover.report import course, example, instruction, outcome
from clover.report.reading import Run, charges, part, read_run, title
from clover.report.template import fill

_PACKAGES = ("torch", "transformers", "timm", "tokenizers", "numpy", "pillow")


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write one run's page, by default `report.html` in its folder; return where it is.

    Raises:
        CloverError: no run folder.
    """
    return write_comparison([run], run / "report.html" if out is None else out)


def write_comparison(runs: Sequence[Path], out: Path) -> Path:
    """Write one page for several runs: one table of scores, then a part for each.

    Raises:
        CloverError: one of them is no run folder.
    """
    found = [read_run(Path(path)) for path in runs]
    if not found:
        raise CloverError("no run given; try `clover report RUN`")
    for index, run in enumerate(found):
        if [other.name for other in found].count(run.name) > 1:
            run.name = f"{run.name} ({index + 1})"
    write_text(out, render(found))
    return out


def render(runs: Sequence[Run]) -> str:
    """Return the page's HTML."""
    return fill(
        "page.html.jinja",
        heading="CLOVER: " + (title(runs[0]) if len(runs) == 1 else f"{len(runs)} runs compared"),
        table=[outcome.table_row(run) for run in runs],
        runs=[_sections(run, index) for index, run in enumerate(runs, start=1)],
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
    )


def _sections(run: Run, index: int) -> dict[str, Any]:
    taught = instruction.training_set(run)
    return {
        "anchor": f"run{index}",
        "name": run.name,
        "title": title(run),
        "folder": str(run.path),
        "problems": run.problems,
        "has_scores": bool(run.scores),
        "tiles": outcome.tiles(run),
        "verdict": run.details.get("verdict"),
        "unfamiliar": (run.details.get("unfamiliar") or {}).get("sentence"),
        "charges": charges(run.details),
        "controls": [
            {"title": name, "chart": outcome.control_chart(run, kind), "caption": ""}
            for kind, name in (("closed", "Closed accuracy, %"), ("open", "Open recall, %"))
        ],
        "notes": outcome.notes(run),
        "forms": outcome.form_rows(run),
        "losses": course.loss_charts(run),
        "alignment": course.alignment_rows(run),
        "pairs": run.alignment.get("num_pairs"),
        "instructions": {
            "total": len(taught),
            "is_hybrid": bool(run.instructions.get("hybrid")),
            "counts": instruction.count_rows(run),
            "origins": instruction.origin_chart(taught),
            "reasons": instruction.reason_chart(run.rejected),
            "lengths": instruction.length_charts(taught),
            "balance": instruction.balance(taught),
            "samples": instruction.samples(taught, run.rejected),
        },
        "num_predictions": len(run.predictions.get("image", [])),
        "examples": example.examples(run),
        "time": course.time_chart(run),
        "bill": course.bill_rows(run),
        "total": outcome.spent(run),
        "memory": course.peak_memory(run),
        "recipe": run.recipe,
        "versions": versions(run),
    }


def versions(run: Run) -> list[tuple[str, str]]:
    """Return what the model folder names, and the packages installed where the page is made."""
    encoder, language = part(run.config, "encoder"), part(run.config, "language")
    rows = [
        ("clover, when trained", run.config.get("clover")),
        ("image encoder, frozen", _with_licence(encoder)),
        ("language model, frozen", _with_licence(language)),
        ("bridge.safetensors, SHA-256", run.config.get("bridge_sha256")),
        ("clover, this page", __version__),
    ]
    for package in _PACKAGES:
        try:
            rows.append((f"{package}, this page", version(package)))
        except PackageNotFoundError:
            continue
    return [(name, str(value)) for name, value in rows if value]


def _with_licence(frozen: dict[str, Any]) -> str:
    said = [frozen.get("id"), frozen.get("revision")]
    text = " @ ".join(str(item) for item in said if item)
    return f"{text} ({frozen['licence']})" if text and frozen.get("licence") else text
