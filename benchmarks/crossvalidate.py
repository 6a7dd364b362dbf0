"""A question that few images ask, scored on all of them: the whole recipe, K times over the groups.

A validation file with 36 answers to a question has an interval of thirty points. Here the groups
(slides, patients) whose images are asked it are dealt into K folds. For each, both stages learn
from all else of the training files and from the other folds, and answer what is held out. So each
answer is given once, by a model that saw nothing of its group, beside the linear probe and the
colours of the same training images.

    python -m benchmarks.crossvalidate DATA --into DIR \
        --question "Which type of cell is most common?" --recipe histology

DATA holds captions_train.jsonl, captions_val.jsonl, vqa_train.jsonl and vqa_val.jsonl; records of
the validation files whose group is not asked the question are left out. Every command goes on where
it was stopped.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from benchmarks.figure import print_figure
from clover.core.files import write_jsonl

Row = dict[str, Any]
OURS = "predictions"
PEERS = ("probe", "colour")


def read(path: Path) -> list[Row]:
    """Return the rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def group_of(row: Row) -> str:
    """Return what must not lie on both sides: the group, or the image where none is named."""
    return str(row.get("group") or row["image"])


def folds(data: Path, question: str, count: int) -> Iterator[dict[str, list[Row]]]:
    """Yield each fold's records: captions and questions to learn from, and the test."""
    kinds = {"captions": "captions", "questions": "vqa"}
    train = {name: read(data / f"{kind}_train.jsonl") for name, kind in kinds.items()}
    held_out = {name: read(data / f"{kind}_val.jsonl") for name, kind in kinds.items()}
    asked = [
        row for row in train["questions"] + held_out["questions"] if row["question"] == question
    ]
    if not asked:
        raise click.ClickException(f"no record of {data} asks '{question}'")
    if any(row.get("answer", "").lower() in ("yes", "no") for row in asked):
        raise click.ClickException(f"'{question}' is a yes/no question; this scores exact answers")
    groups = sorted({group_of(row) for row in asked})
    if count > len(groups):
        raise click.ClickException(f"--folds {count}: there are {len(groups)} groups")
    wanted = set(groups)
    random.Random(0).shuffle(groups)
    for fold in range(count):
        held = set(groups[fold::count])
        yield {
            **{
                name: [
                    row
                    for row in [*train[name], *(r for r in held_out[name] if group_of(r) in wanted)]
                    if group_of(row) not in held
                ]
                for name in kinds
            },
            "test": [row for row in asked if group_of(row) in held],
        }


def train_and_answer(folder: Path, options: dict[str, list[str]]) -> None:
    """Run a fold's three commands; each goes on where it was stopped."""
    there, recipe = options["there"], options["recipe"]
    questions = ["--data", "questions.jsonl"]
    # Groups are apart; images of two groups that merely look alike are no reason to stop.
    beside = ["--train", "questions.jsonl", "--allow-leaks"]
    for verb in (
        ["align", *recipe, "--data", "captions.jsonl", "--out", "run"],
        ["tune", *recipe, *questions, "--from", "run", "--out", "model"],
        ["evaluate", "model", "--data", "test.jsonl", *beside, "--out", "evaluation"],
    ):
        subprocess.run([sys.executable, "-m", "clover", *verb, *there], cwd=folder, check=True)


def collect(folders: list[Path], name: str, out: Path) -> None:
    """Write the answers of all folds as one file, whose intervals draw whole groups."""
    rows = [
        {**row, "image": group_of(row)}
        for folder in folders
        for row in read(folder / "evaluation" / f"{name}.jsonl")
        if "header" not in row
    ]
    write_jsonl(out, rows)


def exact(out: Path, peer: str) -> tuple[Row, Row]:
    """Return our exact answers, and the difference to a peer's, with their intervals."""
    command = [sys.executable, "-m", "clover", "score", str(out / f"{OURS}.jsonl")]
    command += [str(out / f"{peer}.jsonl"), "--json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["strict"]
    return found["open_exact"], found["against"]["open_exact"]


@click.command()
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--question", required=True, help="The question, as the records word it.")
@click.option("--recipe", default="histology", show_default=True)
@click.option("--set", "changes", multiple=True, metavar="SECTION.KEY=VALUE")
@click.option("--folds", "count", type=click.IntRange(2), default=5, show_default=True)
@click.option("--into", type=click.Path(path_type=Path), required=True)
def main(
    data: Path, question: str, recipe: str, changes: tuple[str, ...], count: int, into: Path
) -> None:
    """Print the share of exact answers, ours beside the probe's and the colours'."""
    changed = [part for change in changes for part in ("--set", change)]
    if Path(recipe).is_file():  # the commands run in a fold's own folder
        recipe = str(Path(recipe).resolve())
    options = {
        "recipe": ["--recipe", recipe, *changed],
        "there": [
            "--images",
            str(data.resolve()),
            "--features",
            str((into / "features").resolve()),
        ],
    }
    folders = []
    for number, records in enumerate(folds(data, question, count)):
        folder = into / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in records.items():
            write_jsonl(folder / f"{name}.jsonl", rows)
        train_and_answer(folder, options)
        folders.append(folder)
    for name in (OURS, *PEERS):
        collect(folders, name, into / f"{name}.jsonl")
    for peer in PEERS:
        ours, difference = exact(into, peer)
        print_figure(
            f"{question} ours, beside {peer}",
            ours["value"],
            "% exact",
            n=ours["n"],
            interval=[ours["low"], ours["high"]],
            **{f"minus_{peer}": difference["difference"]},
            difference_interval=[difference["low"], difference["high"]],
        )


if __name__ == "__main__":
    main()
