"""What stages, question and instructions are worth: each left out once, several seeds.

    python -m benchmarks.ablation clover-demo OUT --questions 400
    python -m benchmarks.ablation RUN OUT --recipe histology --instructions vqa_train.jsonl \\
        --validation vqa_val.jsonl --features features/ --images histology/

RUN holds stage 1's `align.safetensors`; a finished demo's folder also holds the recipe, the
instructions, the fresh images and the features, and nothing else need be named. Tunes once for each
variant and seed, and asks the same questions. With a demo's instructions, template-only and
generation-only ones are variants too; "generated" is all that the demo has besides templates: what
a language model wrote, and the phantom's truth in the place of the rest. Prints one JSON line a
run, one a variant (the mean over seeds with its 95 % interval over images) and one for each variant
less the whole recipe, paired. The seeds share stage 1. Finished runs in OUT are not repeated, and
their models are not kept.
"""

from __future__ import annotations

import argparse
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from benchmarks.seeds import print_mean, print_run, read_ratings
from clover.core.config import load_recipe
from clover.core.record import read_records, write_records
from clover.evaluate.control import Rated
from clover.evaluate.run import evaluate_folder
from clover.tune.run import tune


@dataclass(frozen=True)
class Variant:
    """What one row of the table learns from."""

    has_stage_1: bool = True
    is_aware: bool = True
    """Whether the Q-Former reads the question."""
    parts: tuple[str, ...] = ("hybrid",)
    """Of a demo's instructions."""


WHOLE = "whole"
VARIANTS = {
    WHOLE: Variant(),
    "no stage 1": Variant(has_stage_1=False),
    "does not see the question": Variant(is_aware=False),
    "neither": Variant(has_stage_1=False, is_aware=False),
    "template only": Variant(parts=("template",)),
    "generated only": Variant(parts=("generated", "truth")),
}


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe")
    parser.add_argument("--instructions", type=Path, help="In place of a demo's three sets.")
    parser.add_argument("--validation", type=Path)
    parser.add_argument("--features", type=Path)
    parser.add_argument("--images", type=Path, help="Of both files; by default as in a demo.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="By default all.")
    parser.add_argument("--questions", type=int, default=400, help="Asked of each model; 0 = all.")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    given = parser.parse_args()
    asked = _sample(given)
    names = given.variants or [
        name
        for name, variant in VARIANTS.items()
        if given.instructions is None or variant.parts == VARIANTS[WHOLE].parts
    ]
    found: dict[str, list[Rated]] = {name: [] for name in names}
    for seed in given.seeds:  # seeds outside: what is stopped early is still a fair comparison
        for name in names:
            found[name].append(_run(given, name, seed, asked))
    for name, runs in found.items():
        print_mean(f"ablation/{name}", runs)
    for name, runs in found.items():
        if name != WHOLE and WHOLE in found:
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


def _instructions(given: argparse.Namespace, parts: tuple[str, ...]) -> Path:
    if given.instructions is not None:
        path: Path = given.instructions
        return path
    sources = [given.run / "instructions" / f"{part}.jsonl" for part in parts]
    path = given.out / f"{'-'.join(parts)}.jsonl"
    if not path.exists():
        write_records(
            path, [r for source in sources if source.exists() for r in read_records(source).records]
        )
    return path


def _run(given: argparse.Namespace, name: str, seed: int, asked: Path) -> Rated:
    """Tune and evaluate one model; return its ratings by question."""
    variant = VARIANTS[name]
    folder = given.out / f"{name.replace(' ', '-')}-{seed}"
    predictions = folder / "evaluation" / "predictions.jsonl"
    features = given.features or given.run / "features"
    if not predictions.exists():
        own = (f"tune.seed={seed}", f"tune.instruction_aware={str(variant.is_aware).lower()}")
        recipe = load_recipe(given.recipe or given.run / "recipe.yaml", (*given.set, *own))
        images = given.images or given.run / "phantom"
        data = recipe.data.model_copy(update={"images": images})
        made = tune(
            recipe.model_copy(update={"data": data}),
            instructions=_instructions(given, variant.parts),
            out=folder / "model",
            run=folder / "run",
            cache=features,
            start=given.run / "align.safetensors" if variant.has_stage_1 else None,
        )
        evaluate_folder(
            made.model,
            data=asked,
            out=folder / "evaluation",
            cache=features,
            images=given.images or given.run / "phantom-validation",
        )
        shutil.rmtree(made.model)
    rated = read_ratings(predictions)
    print_run(f"ablation/{name}/seed {seed}", rated)
    return rated


if __name__ == "__main__":
    main()
