"""What the stages are worth: with and without stage 1, with and without the question before it.

    python -m benchmarks.ablation clover-demo OUT --questions 400
    python -m benchmarks.ablation RUN OUT --recipe histology --instructions vqa_train.jsonl \\
        --validation vqa_val.jsonl --features features/ --images histology/

RUN holds stage 1's `align.safetensors`; a finished demo's folder also holds the recipe, the
instructions, the fresh images and the features, and nothing else need be named. Tunes once for each
variant and seed, and asks the same questions. Prints one JSON line a run, one a variant (the mean
over seeds with its 95 % interval over images) and one for each variant less the whole recipe,
paired. The seeds share stage 1. Finished runs in OUT are not repeated.
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

WHOLE = "stage 1, sees the question"
VARIANTS: dict[str, tuple[bool, bool]] = {
    WHOLE: (True, True),
    "no stage 1, sees the question": (False, True),
    "stage 1, does not see it": (True, False),
    "no stage 1, does not see it": (False, False),
}
"""Name -> whether it starts from stage 1, whether the Q-Former reads the question."""


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe")
    parser.add_argument("--instructions", type=Path)
    parser.add_argument("--validation", type=Path)
    parser.add_argument("--features", type=Path)
    parser.add_argument("--images", type=Path, help="Of both files; by default as in a demo.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=400, help="Asked of each model; 0 = all.")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    given = parser.parse_args()
    asked = _sample(given)
    found: dict[str, list[Rated]] = {name: [] for name in VARIANTS}
    for seed in given.seeds:  # seeds outside: what is stopped early is still a fair comparison
        for name in VARIANTS:
            found[name].append(_run(given, name, seed, asked))
    for name, runs in found.items():
        print_mean(f"ablation/{name}", runs)
    for name, runs in found.items():
        if name != WHOLE:
            print_mean(f"ablation/{name}, less the whole", runs, beside=found[WHOLE])


def _sample(given: argparse.Namespace) -> Path:
    path: Path = given.out / "asked.jsonl"
    if not path.exists():
        source = given.validation or given.run / "phantom-validation" / "vqa.jsonl"
        records = read_records(source, needs="question").records
        random.Random(0).shuffle(records)
        given.out.mkdir(parents=True, exist_ok=True)
        write_records(path, records[: given.questions or len(records)])
    return path


def _run(given: argparse.Namespace, name: str, seed: int, asked: Path) -> Rated:
    """Tune and evaluate one model; return its ratings by question."""
    has_stage_1, is_aware = VARIANTS[name]
    folder = given.out / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    predictions = folder / "evaluation" / "predictions.jsonl"
    features = given.features or given.run / "features"
    if not predictions.exists():
        recipe = load_recipe(
            given.recipe or given.run / "recipe.yaml",
            (*given.set, f"tune.seed={seed}", f"tune.instruction_aware={str(is_aware).lower()}"),
        )
        images = given.images or given.run / "phantom"
        data = recipe.data.model_copy(update={"images": images})
        made = tune(
            recipe.model_copy(update={"data": data}),
            instructions=given.instructions or given.run / "instructions" / "hybrid.jsonl",
            out=folder / "model",
            run=folder / "run",
            cache=features,
            start=given.run / "align.safetensors" if has_stage_1 else None,
        )
        evaluate_folder(
            made.model,
            data=asked,
            out=folder / "evaluation",
            cache=features,
            images=given.images or given.run / "phantom-validation",
        )
    rated = read_ratings(predictions)
    print_run(f"ablation/{name}/seed {seed}", rated)
    return rated


if __name__ == "__main__":
    main()
