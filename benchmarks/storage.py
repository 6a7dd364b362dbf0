"""What the number format of stored features does to answers and scores.

    python -m benchmarks.storage MODEL --data vqa.jsonl [--questions 250]

The same questions, drawn at random, are answered from features as the encoder gave them (float32)
and from what half precision, bfloat16 and int8 (one scale a token) keep of them. Printed a format:
closed accuracy and open recall by the strict rule, how many answers differ from float32's in a
letter, and the mean error of a token in parts of its norm.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

import clover
from benchmarks.figure import print_figure
from clover.core.record import Record, read_records
from clover.model import Clover
from clover.vision.storage import STORAGES, pack, unpack


def answers(model: Clover, tokens: dict[str, Tensor], asked: list[Record]) -> list[str]:
    """Answer questions about images given as tokens [P, E], by the images' names."""
    found: list[str] = []
    size = model.recipe.evaluate.batch_size
    for start in range(0, len(asked), size):
        part = asked[start : start + size]
        features = torch.stack([tokens[str(record.image)] for record in part])
        questions = [model.question_of(record) for record in part]
        found += model.answer_features(features, questions, model.default_settings())
    return found


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(path_type=Path))
@click.option("--questions", default=250, show_default=True)
def main(folder: Path, data: Path, questions: int) -> None:
    """Print one figure a number format."""
    torch.set_num_threads(1)
    model = clover.load(folder)
    found = read_records(data, needs="question")
    order = np.random.default_rng(0).permutation(len(found.records))[:questions]
    # Of like length together, as `clover evaluate` asks: they are padded least.
    asked = sorted((found.records[place] for place in order), key=lambda r: len(r.question or ""))
    whole = {
        name: model.encode(found.folder / name)[0]
        for name in dict.fromkeys(str(record.image) for record in asked)
    }
    first: list[str] = []
    for storage in ("float32", *STORAGES):
        kept = whole
        if storage != "float32":
            kept = {name: unpack(pack(item, storage)) for name, item in whole.items()}
        said = answers(model, kept, asked)
        first = first or said
        rows = [
            {**record.row(), "prediction": text} for record, text in zip(asked, said, strict=True)
        ]
        scores = clover.score(rows, "strict", draws=0)
        error = np.mean(
            [
                float(((kept[name] - item).norm(dim=-1) / item.norm(dim=-1)).mean())
                for name, item in whole.items()
            ]
        )
        print_figure(
            f"closed accuracy, features in {storage}", scores["closed"]["value"], "%",
            open_recall=round(scores["open_recall"]["value"], 2), questions=len(asked),
            images=len(whole), peer="float32",
            other_answers=sum(one != other for one, other in zip(first, said, strict=True)),
            token_error=round(float(error), 6),
        )  # fmt: skip


if __name__ == "__main__":
    main()
