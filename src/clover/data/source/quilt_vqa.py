"""QUILT-VQA: its truth file, its question lines joined with one, or the hub's Parquet.

Open and closed stand in `answer_type`. A closed question's gold is `yes_no_answer`; the sentence
that explains it is kept as `explanation`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clover.core.errors import CloverError
from clover.data.lines import Line, read_lines, split_name
from clover.data.source.base import Options, Unique, clean, is_yes_or_no

LICENCE = "CC-BY-NC-ND-3.0"
_KEPT = ("context", "category", "yes_no_answer")


def read(lines: Iterator[Line], options: Options) -> Iterator[Line]:
    """Yield one line a question, in our columns.

    Raises:
        CloverError: question lines without answers and no truth file, or one that knows none of
            them.
    """
    truth = None if options.truth is None else _truth(options.truth)
    unique = Unique()
    joined = 0
    num_lines = 0
    for line in lines:
        if not isinstance(line.row, dict):
            yield line
            continue
        num_lines += 1
        row = line.row
        if truth is not None:
            known = truth.get(_id(row), {})
            joined += bool(known)
            row = {**row, **known}
        elif "answer" not in row:
            raise CloverError(f"{line.path} asks and does not answer: name the truth with --truth")
        yield line._replace(row=_record(row, line, unique))
    if truth is not None and num_lines and not joined:
        raise CloverError(f"{options.truth} knows none of the {num_lines:,} questions by their id")


def _id(row: Mapping[str, Any]) -> str:
    found = (row[name] for name in ("question_id", "id") if row.get(name) is not None)
    return clean(next(found, ""))


def _truth(path: Path) -> dict[str, dict[str, Any]]:
    """Return the answering columns by id: an answers file calls its answer `text`."""
    found: dict[str, dict[str, Any]] = {}
    for line in read_lines(path):
        if isinstance(line.row, dict):
            answer = line.row.get("answer", line.row.get("text"))
            names = ("answer_type", "yes_no_answer", "context")
            kept = {name: line.row[name] for name in names if line.row.get(name) is not None}
            found[_id(line.row)] = {"answer": answer, **kept}
    return found


def _record(row: Mapping[str, Any], line: Line, unique: Unique) -> dict[str, Any]:
    answer = clean(row.get("answer"))
    bare = clean(row.get("yes_no_answer")).lower().rstrip(".")
    stated = clean(row.get("answer_type")).lower()
    kind = stated or ("closed" if bare or is_yes_or_no(answer) else "open")
    made: dict[str, Any] = {name: row[name] for name in _KEPT if row.get(name) not in (None, "")}
    if kind == "closed":
        if not bare:  # the sentence itself begins with the word
            word = answer.lower().partition(" ")[0].strip(".,;:!")
            bare = word if is_yes_or_no(word) else ""
        if answer and not is_yes_or_no(answer):
            made["explanation"] = answer
        answer = bare
    made |= {"question": clean(row.get("question", row.get("text"))), "answer": answer}
    made |= {"answer_type": kind, "image": row.get("image"), "source": "quilt-vqa"}
    made["id"] = unique(_id(row) or f"quilt-vqa-{line.number}")
    made["licence"] = LICENCE
    made["split"] = split_name(clean(row.get("split"))) or line.split
    return made
