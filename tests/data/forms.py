"""The forms PathVQA is passed on in, made from its flat table so that readers can be compared."""

from __future__ import annotations

import csv
import gzip
import json
import pickle
from itertools import groupby
from pathlib import Path
from typing import Any

Row = dict[str, str]


def pathvqa_rows(shared: Path) -> list[Row]:
    path = shared / "data/text/pathvqa_qa.csv.gz"
    with gzip.open(path, "rt", encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def _by_split(rows: list[Row]) -> dict[str, list[Row]]:
    return {name: list(found) for name, found in groupby(rows, key=lambda row: row["split"])}


def write_pickles(folder: Path, rows: list[Row]) -> Path:
    """Write `{split}_qa.pkl` as published: a list of image, question, answer."""
    for split, found in _by_split(rows).items():
        plain = [
            {"image": row["img_id"], "question": row["question"], "answer": row["answer"]}
            for row in found
        ]
        place = folder / split / f"{split}_qa.pkl"
        place.parent.mkdir(parents=True)
        place.write_bytes(pickle.dumps(plain, protocol=2))
    return folder


def write_lxmert(folder: Path, rows: list[Row]) -> Path:
    """Write `{split}_vqa.pkl` as published: one row a question, its answer the key of `label`."""
    for split, found in _by_split(rows).items():
        plain = [
            {
                "img_id": row["img_id"],
                "question_id": number,
                "sent": row["question"],
                "label": {row["answer"]: 1.0},
                "question_type": "other",
                "answer_type": "yes/no" if row["answer"].lower() in ("yes", "no") else "other",
            }
            for number, row in enumerate(found)
        ]
        folder.mkdir(exist_ok=True)
        (folder / f"{split}_vqa.pkl").write_bytes(pickle.dumps(plain, protocol=3))
    return folder


def write_conversations(folder: Path, rows: list[Row]) -> Path:
    """Write LLaVA-Med's `{split}.json`, a closed question with the options it is given there."""
    folder.mkdir()
    for split, found in _by_split(rows).items():
        plain: list[dict[str, Any]] = []
        for number, row in enumerate(found):
            closed = row["answer"].lower() in ("yes", "no")
            offer = " Please choose from the following two options: [yes, no]" if closed else ""
            human = {"from": "human", "value": f"{row['question']}{offer}\n<image>"}
            plain.append(
                {
                    "id": str(number),
                    "image": f"{row['img_id']}.jpg",
                    "answer_type": "CLOSED" if closed else "OPEN",
                    "conversatons" if number % 2 else "conversations": [
                        human,
                        {"from": "gpt", "value": row["answer"]},
                    ],
                }
            )
        (folder / f"{split}.json").write_text(json.dumps(plain), encoding="utf-8")
    return folder


def write_parquet(folder: Path, rows: list[Row], *, named: bool = True) -> Path:
    """Write the hub's shards: the picture inside, with its name or without."""
    import pyarrow as arrow
    import pyarrow.parquet

    folder.mkdir()
    for split, found in _by_split(rows).items():
        name = "validation" if split == "val" else split
        plain = [
            {
                "image": {
                    "bytes": row["img_id"].encode(),
                    "path": f"{row['img_id']}.jpg" if named else None,
                },
                "question": row["question"],
                "answer": row["answer"],
            }
            for row in found
        ]
        kind = arrow.schema(
            [
                ("image", arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])),
                ("question", arrow.string()),
                ("answer", arrow.string()),
            ]
        )
        table = arrow.Table.from_pylist(plain, schema=kind)
        arrow.parquet.write_table(table, folder / f"{name}-00000-of-00001.parquet")
    return folder
