"""Questions that few images ask, scored on all of them: the whole recipe, K times over the groups.

A validation file with 36 answers to a question has an interval of thirty points. Here the groups
(slides, patients) whose images are asked any of the questions are dealt into K folds. For each,
both stages learn from all else of the training files and from the other folds, and answer what is
held out. So each answer is given once, by a model that saw nothing of its group, beside the linear
probe and the colours of the same training images, and beside the same model without the image.

    python -m benchmarks.crossvalidate DATA --into DIR --recipe histology \
        --question "Which type of cell is most common?" --question "Are fibroblasts present?"

DATA holds captions_train.jsonl, captions_val.jsonl, vqa_train.jsonl and vqa_val.jsonl; records of
the validation files whose group is asked none of the questions are left out. Every command goes on
where it was stopped.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from pathlib import Path

import click

from benchmarks.figure import print_figure
from clover.align.run import align
from clover.core.config import Recipe, load_recipe
from clover.core.files import write_jsonl
from clover.core.record import Record, read_records, write_records
from clover.evaluate.item import Problems, read_rows
from clover.evaluate.run import evaluate_folder
from clover.evaluate.score import compare_files, read_sheet, score_sheet
from clover.evaluate.view import find_controls
from clover.tune.run import tune

OURS = "predictions"
PEERS = ("probe", "colour", "blind")
KINDS = {"captions": "captions", "questions": "vqa"}


def folds(data: Path, questions: Collection[str], count: int) -> Iterator[dict[str, list[Record]]]:
    """Yield each fold's records: captions and questions to learn from, and the test."""
    train, held_out = (
        {name: read_records(data / f"{kind}_{split}.jsonl").records for name, kind in KINDS.items()}
        for split in ("train", "val")
    )
    asked = [
        record
        for record in train["questions"] + held_out["questions"]
        if record.question in questions
    ]
    for question in questions:
        if not any(record.question == question for record in asked):
            raise click.ClickException(f"no record of {data} asks '{question}'")
    groups = sorted({_group(record) for record in asked})
    if count > len(groups):
        raise click.ClickException(f"--folds {count}: there are {len(groups)} groups")
    wanted = set(groups)
    random.Random(0).shuffle(groups)
    known = {
        name: train[name] + [record for record in held_out[name] if _group(record) in wanted]
        for name in KINDS
    }
    for fold in range(count):
        held = set(groups[fold::count])
        learnt = {
            name: [record for record in records if _group(record) not in held]
            for name, records in known.items()
        }
        yield {**learnt, "test": [record for record in asked if _group(record) in held]}


def _group(record: Record) -> str | None:
    return record.group or record.image


def train_and_answer(folder: Path, recipe: Recipe, cache: Path) -> None:
    """Run both stages on a fold's records and ask its test; what is done is not done again."""
    questions, run = folder / "questions.jsonl", folder / "run"
    aligned = align(recipe, captions=folder / "captions.jsonl", out=run, cache=cache)
    model = tune(
        recipe,
        instructions=questions,
        out=folder / "model",
        run=run,
        cache=cache,
        start=aligned.weights,
    ).model
    evaluate_folder(
        model,
        data=folder / "test.jsonl",
        out=folder / "evaluation",
        cache=cache,
        images=recipe.data.images,
        train=questions,
        controls=find_controls("blind"),
    )


def collect(folders: list[Path], name: str, question: str, out: Path) -> None:
    """Write the answers of all folds to a question as one file; its intervals draw groups."""
    write_jsonl(
        out,
        (
            {**row, "image": row.get("group") or row["image"]}
            for folder in folders
            for row in read_rows(folder / "evaluation" / f"{name}.jsonl", Problems())
            if "header" not in row and row["question"] == question
        ),
    )


@click.command()
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--question",
    "questions",
    required=True,
    multiple=True,
    help="A question, as the records word it; may be given several times.",
)
@click.option("--recipe", "named", default="histology", show_default=True)
@click.option("--set", "changes", multiple=True, metavar="SECTION.KEY=VALUE")
@click.option("--folds", "count", type=click.IntRange(2), default=5, show_default=True)
@click.option("--into", type=click.Path(path_type=Path), required=True)
def main(
    data: Path,
    questions: tuple[str, ...],
    named: str,
    changes: tuple[str, ...],
    count: int,
    into: Path,
) -> None:
    """Print the share of right answers, ours beside the probe's, the colours' and the blind."""
    recipe = load_recipe(named, changes)
    recipe = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"images": data.resolve()})}
    )
    folders = []
    for number, records in enumerate(folds(data, questions, count)):
        folder = into / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in records.items():
            write_records(folder / f"{name}.jsonl", rows)
        train_and_answer(folder, recipe, into / "features")
        folders.append(folder)
    for number, question in enumerate(questions):
        compare(folders, question, into / f"question-{number}")


def compare(folders: list[Path], question: str, into: Path) -> None:
    """Print one question's figures."""
    into.mkdir(exist_ok=True)
    for name in (OURS, *PEERS):
        collect(folders, name, question, into / f"{name}.jsonl")
    rated = read_sheet(into / f"{OURS}.jsonl")
    scores = score_sheet(*rated, draws=1000, seed=0)["strict"]
    by = "closed" if scores["closed"]["n"] else "open_exact"
    for peer in PEERS:
        second = read_sheet(into / f"{peer}.jsonl")
        difference = compare_files(rated, second, draws=1000, seed=0)["strict"][by]
        print_figure(
            f"{question} ours, beside {peer}",
            scores[by]["value"],
            f"%, {by}",
            n=scores[by]["n"],
            interval=[scores[by]["low"], scores[by]["high"]],
            **{f"minus_{peer}": difference["difference"]},
            difference_interval=[difference["low"], difference["high"]],
        )


if __name__ == "__main__":
    main()
