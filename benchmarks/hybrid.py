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
import random
from pathlib import Path

from benchmarks.seeds import print_mean, print_run, read_ratings
from clover.core.config import load_recipe
from clover.core.record import read_records, write_records
from clover.evaluate.control import Rated
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
    found: dict[str, list[Rated]] = {name: [] for name in SETS}
    for seed in given.seeds:  # seeds outside: what is stopped early is still a fair comparison
        for name in SETS:
            found[name].append(_run(given, name, seed, asked))
    for name, runs in found.items():
        print_mean(f"hybrid/{name}", runs)


def _sample(demo: Path, out: Path, wanted: int) -> Path:
    path = out / "asked.jsonl"
    if not path.exists():
        records = read_records(demo / "phantom-validation" / "vqa.jsonl", needs="question").records
        random.Random(0).shuffle(records)
        out.mkdir(parents=True, exist_ok=True)
        write_records(path, records[:wanted])
    return path


def _run(given: argparse.Namespace, name: str, seed: int, asked: Path) -> Rated:
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
    rated = read_ratings(predictions)
    print_run(f"hybrid/{name}/seed {seed}", rated)
    return rated


if __name__ == "__main__":
    main()
