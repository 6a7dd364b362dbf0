"""Labelled images of somebody else, put as a question: what few-shot tuning learns and is asked.

In: a folder with a subfolder a class, or a CSV or JSON Lines file with `image` and `label` (and
`group`, `split`, where there are any). Out: records whose answer is the label in words.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from clover.core.errors import CloverError
from clover.core.record import Record, read_records
from clover.slides.region import slide_of
from clover.slides.source import PLAIN_SUFFIXES

_TEST = frozenset({"test", "val", "valid", "validation", "held-out"})
QUESTION = "What is the diagnosis?"


def read_labelled(path: Path, *, question: str, answers: Mapping[str, str]) -> list[Record]:
    """Read labelled images.

    Args:
        path: A folder of class folders, or a table of `image` and `label`.
        question: What is asked of every image.
        answers: Label -> the answer that stands for it; by default the label in words.

    Returns:
        Records with question and answer; `image` relative to the folder, or to the table's folder.

    Raises:
        CloverError: nothing there, or fewer than two classes.
    """
    found = _read_folder(path) if path.is_dir() else _read_table(path)
    unknown = [label for label in answers if label not in {item.answer for item in found}]
    if unknown:
        labels = sorted({str(item.answer) for item in found})
        raise CloverError(f"--answers names '{unknown[0]}', the labels are {', '.join(labels)}")
    records = []
    for item in found:
        label = str(item.answer)
        answer = answers.get(label, label.replace("_", " ").strip())
        is_closed = answer.lower() in ("yes", "no")
        changed = {
            "question": question,
            "answer": answer,
            "answer_type": "closed" if is_closed else "open",
            "group": item.group or slide_of(str(item.image)),  # regions of a slide go together
        }
        records.append(item.model_copy(update=changed))
    classes = {record.answer for record in records}
    if len(classes) < 2:
        raise CloverError(
            f"{path} holds {len(classes)} class; two or more are needed to tell apart"
        )
    return records


def _read_folder(path: Path) -> list[Record]:
    found = [
        Record(id=str(file.relative_to(path)), image=str(file.relative_to(path)), answer=part.name)
        for part in sorted(item for item in path.iterdir() if item.is_dir())
        for file in sorted(part.rglob("*"))
        if file.suffix.lower() in PLAIN_SUFFIXES
    ]
    if not found:
        raise CloverError(f"{path} holds no image in a class folder, as {path}/CLASS/image.png")
    return found


def _read_table(path: Path) -> list[Record]:
    found = [r for r in read_records(path).records if r.image and (r.answer or "").strip()]
    if not found:
        raise CloverError(f"{path} has no row with image and label; its columns are image,label")
    return found


def split(
    records: Sequence[Record], *, share: float = 0.5, seed: int = 0
) -> tuple[list[Record], list[Record]]:
    """Split records into a pool to draw shots from and a test set; no group is in both.

    Records that name their split (train, test, validation) are split so; otherwise a share of the
    groups is drawn.
    """
    if all(record.split for record in records):
        is_test = [str(record.split).lower() in _TEST for record in records]
    else:
        groups = sorted({str(record.group) for record in records})
        random.Random(seed).shuffle(groups)
        held = set(groups[: max(1, round(share * len(groups)))])
        is_test = [str(record.group) in held for record in records]
    pool = [record for record, out in zip(records, is_test, strict=True) if not out]
    return pool, [record for record, out in zip(records, is_test, strict=True) if out]


def draw_shots(pool: Sequence[Record], *, count: int, seed: int) -> list[int]:
    """Draw `count` records of each class: those of one seed and fewer shots are among them.

    Different groups first: copies of one picture are not shots of their own.

    Raises:
        CloverError: a class has fewer.
    """
    by_class: dict[str, list[int]] = defaultdict(list)
    for index, record in enumerate(pool):
        by_class[str(record.answer)].append(index)
    drawn = []
    for name in sorted(by_class):
        places = by_class[name]
        if len(places) < count:
            raise CloverError(
                f"class '{name}' has {len(places)} images to draw from, {count} shots were asked "
                f"for; give --shots {len(places)} or less"
            )
        order = list(places)
        random.Random(f"{seed} {name}").shuffle(order)
        seen: Counter[str] = Counter()
        rank = {}
        for place in order:
            group = str(pool[place].group)
            rank[place] = seen[group]
            seen[group] += 1
        drawn += sorted(order, key=rank.__getitem__)[:count]
    return drawn
