"""Hybrid instructions against template-only and generation-only: same steps, several seeds.

    python -m benchmarks.hybrid clover-demo OUT --set tune.steps=20

Takes a finished demo's folder (features, instructions, stage 1), tunes once for each set and seed
with the demo's recipe, and asks about fresh images. "Generated" is all that the demo has besides
templates: what a language model wrote, and the phantom's truth in the place of the rest. Prints one
JSON line a run, and one a set: the mean over seeds with its 95 % interval over images. The seeds
share stage 1. Finished runs in OUT are not repeated.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np

from benchmarks.figure import print_figure
from clover.core.config import load_recipe
from clover.core.record import read_records, write_records
from clover.evaluate.control import ratings
from clover.evaluate.interval import bootstrap_means, cluster_codes, interval
from clover.evaluate.run import evaluate_folder
from clover.tune.run import tune

SETS = {
    "template": ("template",),
    "generated": ("generated", "truth"),
    "hybrid": ("hybrid",),
}


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("demo", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=400, help="Asked of each model.")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    given = parser.parse_args()
    asked = _sample(given.demo, given.out, given.questions)
    found: dict[str, list[dict[str, tuple[bool, float, str]]]] = {name: [] for name in SETS}
    for seed in given.seeds:  # seeds outside: what is stopped early is still a fair comparison
        for name in SETS:
            found[name].append(_run(given, name, seed, asked))
    for name, runs in found.items():
        _print_mean(name, runs)


def _sample(demo: Path, out: Path, wanted: int) -> Path:
    path = out / "asked.jsonl"
    if not path.exists():
        records = read_records(demo / "phantom-validation" / "vqa.jsonl", needs="question").records
        random.Random(0).shuffle(records)
        out.mkdir(parents=True, exist_ok=True)
        write_records(path, records[:wanted])
    return path


def _run(
    given: argparse.Namespace, name: str, seed: int, asked: Path
) -> dict[str, tuple[bool, float, str]]:
    """Tune and evaluate one model; return its ratings by question."""
    demo, folder = given.demo, given.out / f"{name}-{seed}"
    predictions = folder / "evaluation" / "predictions.jsonl"
    recipe = load_recipe(demo / "recipe.yaml", (*given.set, f"tune.seed={seed}"))
    data = recipe.data.model_copy(update={"images": demo / "phantom"})
    if not predictions.exists():
        records = [
            record
            for part in SETS[name]
            if (demo / "instructions" / f"{part}.jsonl").exists()
            for record in read_records(demo / "instructions" / f"{part}.jsonl").records
        ]
        folder.mkdir(parents=True, exist_ok=True)
        write_records(folder / "instructions.jsonl", records)
        made = tune(
            recipe.model_copy(update={"data": data}),
            instructions=folder / "instructions.jsonl",
            out=folder / "model",
            run=folder / "run",
            cache=demo / "features",
            start=demo / "align.safetensors",
        )
        evaluate_folder(
            made.model,
            data=asked,
            out=folder / "evaluation",
            cache=demo / "features",
            images=demo / "phantom-validation",
        )
    lines = predictions.read_text(encoding="utf-8").splitlines()[1:]
    rated = ratings([json.loads(line) for line in lines])
    for kind, is_closed in (("closed", True), ("open_recall", False)):
        values = [value for closed, value, _ in rated.values() if closed == is_closed]
        print_figure(
            f"hybrid/{name}/seed {seed}/{kind}", 100 * float(np.mean(values)), "%", n=len(values)
        )
    return rated


def _print_mean(name: str, runs: list[dict[str, tuple[bool, float, str]]]) -> None:
    for kind, is_closed in (("closed", True), ("open_recall", False)):
        ids = [item for item, (closed, _, _) in runs[0].items() if closed == is_closed]
        values = np.array([[np.mean([run[item][1] for run in runs])] for item in ids])
        codes = cluster_codes([runs[0][item][2] for item in ids])
        low, high = interval(bootstrap_means(values, codes, draws=1000)[:, 0])
        seeds = [100 * float(np.mean([run[item][1] for item in ids])) for run in runs]
        print_figure(
            f"hybrid/{name}/{kind}",
            100 * float(values.mean()),
            "%",
            low=None if low is None else round(100 * low, 1),
            high=None if high is None else round(100 * high, 1),
            seeds=[round(value, 1) for value in seeds],
            n=len(ids),
        )


if __name__ == "__main__":
    main()
