"""A run folder, read as it is: whatever is missing or damaged is noted, never a crash."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from clover.core.errors import CloverError
from clover.core.run import RunFolder

Row = dict[str, Any]

VIEWS = ("image", "blind", "shuffled", "noise", "colour")
INSTRUCTIONS = ("template", "generated", "truth", "hybrid")
_FILES = ("recipe.yaml", "metrics.jsonl", "costs.json", "scores.json", "predictions.jsonl")
_FOLDERS = ("evaluation", "instructions", "model")


@dataclass
class Run:
    """What a run folder holds; an absent part is empty."""

    path: Path
    name: str
    recipe: str = ""
    scores: Row = field(default_factory=dict)
    costs: Row = field(default_factory=dict)
    alignment: Row = field(default_factory=dict)
    config: Row = field(default_factory=dict)
    metrics: list[Row] = field(default_factory=list)
    predictions: dict[str, list[Row]] = field(default_factory=dict)
    instructions: dict[str, list[Row]] = field(default_factory=dict)
    rejected: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Files that could not be read, and lines that were passed over."""

    @property
    def details(self) -> Row:
        """The lower level of `scores.json`."""
        return part(self.scores, "details")


def part(row: Any, *names: str) -> Row:
    """Return a mapping inside mappings, empty where there is none."""
    for name in names:
        row = row.get(name) if isinstance(row, dict) else None
    return row if isinstance(row, dict) else {}


def charges(details: Row) -> list[str]:
    """Return what `clover score` or `clover evaluate` exposed a model as, a sentence each."""
    found = part(details, "exposed").get("charges")
    listed = found if isinstance(found, list) else []
    return [str(one["sentence"]) for one in listed if part(one).get("sentence")]


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        CloverError: no such folder, or a folder that holds nothing of a run.
    """
    if not path.is_dir():
        raise CloverError(f"no run folder {path}; `clover demo --out DIR` makes one")
    known = [path / name for name in (*_FILES, *_FOLDERS)]
    if not any(item.exists() for item in known):
        raise CloverError(
            f"{path} holds nothing of a run (none of {', '.join(_FILES)}); "
            "give the folder that `clover demo --out` or `clover evaluate --out` wrote"
        )
    run = Run(path, path.resolve().name)
    folder = path / "evaluation" if (path / "evaluation").is_dir() else path
    run.scores = _object(run, path / "scores.json") or _object(run, folder / "scores.json")
    run.costs = _object(run, path / "costs.json")
    run.alignment = _object(run, path / "align.scores.json")
    run.config = _object(run, path / "model" / "config.json")
    run.recipe = _text(run, path / "recipe.yaml")
    run.metrics = _metrics(run)
    for view in VIEWS:
        name = "predictions" if view == "image" else view
        run.predictions[view] = list(_rows(run, folder / f"{name}.jsonl"))
    for name in INSTRUCTIONS:
        run.instructions[name] = list(_rows(run, path / "instructions" / f"{name}.jsonl"))
    run.rejected = list(_rows(run, path / "instructions" / "generated.rejected.jsonl"))
    return run


def title(run: Run) -> str:
    """Return what the model is called: as the model folder says, or the recipe, or the folder."""
    name = run.config.get("name")
    if not name and run.recipe:
        try:
            name = part(yaml.safe_load(run.recipe)).get("name")
        except yaml.YAMLError:
            name = None
    return str(name or run.name)


def _text(run: Run, path: Path) -> str:
    if not path.is_file():
        return ""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        run.problems.append(f"{path.name} cannot be read: {error.strerror}")
        return ""


def _object(run: Run, path: Path) -> Row:
    text = _text(run, path)
    if not text:
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        run.problems.append(f"{path.name} is not JSON: {error}")
        return {}
    if not isinstance(found, dict):
        run.problems.append(f"{path.name} is not a JSON object")
        return {}
    return found


def _rows(run: Run, path: Path) -> Iterator[Row]:
    """Yield the objects of a JSON Lines file but its header; torn lines are counted."""
    damaged = 0
    for line in _text(run, path).splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            damaged += 1
            continue
        if not isinstance(row, dict):
            damaged += 1
        elif "header" not in row:
            yield row
    if damaged:
        run.problems.append(f"{path.name}: {damaged:,} damaged lines were passed over")


def _metrics(run: Run) -> list[Row]:
    try:
        return RunFolder(run.path).metrics()
    except (KeyError, TypeError, UnicodeDecodeError):
        run.problems.append("metrics.jsonl has lines without a stage and a step")
        return []
