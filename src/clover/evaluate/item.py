"""Anybody's prediction lines, read one by one; whatever is odd about them is counted.

In: JSON Lines (or one JSON list, or CSV) of ``id, question, answer, answer_type, prediction`` with
``yes_no_answer, image, group, form`` where there are any; a first line ``{"header": ...}`` is kept
apart. Out: `Item`s, one at a time, so that a million lines need no memory.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from clover.core.errors import CloverError
from clover.core.text_file import WINDOWS, encoding_of
from clover.evaluate.protocol import Item

_SYNONYMS = {
    "id": ("question_id", "qid"),
    "question": ("prompt", "sent"),
    "answer": ("question_ans", "gold", "label"),
    "prediction": ("pred", "predict_ans", "predicted", "response", "text"),
    "image": ("image_path", "img_id", "group"),
}
_OPEN = frozenset({"open", "other", "number"})
_CLOSED = frozenset({"closed", "yes/no", "yes_no", "close"})


class Problems:
    """Counts of what was odd in the input, each as one line for the user."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, kind: str, where: object = None) -> None:
        """Count one oddity; the first place is remembered."""
        self.counts[kind] += 1
        if where is not None:
            self._first.setdefault(kind, str(where)[:60])

    def merge(self, other: Problems) -> None:
        """Add what was counted elsewhere."""
        self.counts.update(other.counts)
        for kind, place in other._first.items():
            self._first.setdefault(kind, place)

    def lines(self) -> list[str]:
        """Return one line a kind: ``3 duplicate ids: the first counts (first: 17)``."""
        return [
            _whole(f"{count:,} {kind}")
            + (_whole(f" (first: {self._first[kind]})") if kind in self._first else "")
            for kind, count in self.counts.items()
        ]


def _decoded(lines: Iterable[bytes], problems: Problems) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        encoding = "utf-8-sig" if number == 1 else "utf-8"
        try:
            yield line.decode(encoding)
        except UnicodeDecodeError:
            problems.add("lines are not UTF-8 and were read as Windows-1252", f"line {number}")
            yield line.decode(encoding, WINDOWS)


def read_rows(path: str | Path, problems: Problems) -> Iterator[dict[str, Any]]:
    """Yield the objects of a `.jsonl` file, a `.json` list or a `.csv` table; headers included.

    Raises:
        CloverError: no such file, or a `.json` file that is neither a list nor lines.
    """
    path = Path(path)
    if not path.is_file():
        raise CloverError(f"no file {path}")
    encoding = _encoding(path)
    kind = path.suffix.lower()
    if kind == ".json":
        yield from _read_list(path, encoding, problems)
    elif kind in (".csv", ".tsv"):
        yield from _read_table(path, encoding, problems)
    else:
        yield from _read_lines(path, encoding, problems)


def _encoding(path: Path) -> str | None:
    """Return the encoding that a file's first bytes betray; None is UTF-8, line by line."""
    with path.open("rb") as handle:
        return encoding_of(handle.read(4))


def _read_lines(path: Path, encoding: str | None, problems: Problems) -> Iterator[dict[str, Any]]:
    if encoding is not None:
        with path.open(encoding=encoding, errors="replace") as text:
            yield from _parsed(text, problems)
    else:
        with path.open("rb") as handle:
            yield from _parsed(_decoded(handle, problems), problems)


def _read_table(path: Path, encoding: str | None, problems: Problems) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(1 << 30)
    with contextlib.ExitStack() as stack:
        if encoding is not None:
            text = stack.enter_context(path.open(encoding=encoding, errors="replace", newline=""))
            lines: Iterable[str] = text
        else:
            lines = _decoded(stack.enter_context(path.open("rb")), problems)
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        try:
            for row in csv.DictReader(lines, delimiter=delimiter):
                # An empty prediction stays one; an empty yes_no_answer or image is none.
                yield {
                    name: value
                    for name, value in row.items()
                    if name and (value or field_name(name) in ("prediction", "answer"))
                }
        except csv.Error as error:
            raise CloverError(f"{path} is not CSV: {error}") from error


def _whole_text(path: Path, encoding: str | None, problems: Problems) -> str:
    data = path.read_bytes()
    try:
        return data.decode(encoding or "utf-8-sig")
    except UnicodeDecodeError:
        if encoding is None:
            problems.add("files are not UTF-8 and were read as Windows-1252", path.name)
        return data.decode(encoding or "utf-8-sig", "replace" if encoding else WINDOWS)


def _read_list(path: Path, encoding: str | None, problems: Problems) -> Iterator[dict[str, Any]]:
    try:
        rows = json.loads(_whole_text(path, encoding, problems))
    except RecursionError as error:
        raise CloverError(f"{path} is not JSON of rows: it is nested too deep") from error
    except ValueError as error:
        if getattr(error, "msg", "") == "Extra data":  # JSON Lines under another name
            yield from _read_lines(path, encoding, problems)
            return
        raise CloverError(f"{path} is not JSON ({error}); name it .jsonl if it is lines") from error
    if not isinstance(rows, list):
        raise CloverError(f"{path} holds a JSON {type(rows).__name__}; a list of objects is needed")
    for number, row in enumerate(rows, start=1):
        if isinstance(row, dict):
            yield row
        else:
            problems.add("entries are not JSON objects and were left out", f"entry {number}")


def _parsed(lines: Iterable[str], problems: Problems) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # ValueError also for numbers of 5,000 digits
            problems.add("lines are not JSON and were left out", f"line {number}")
            continue
        if isinstance(row, dict):
            yield row
        else:
            problems.add("lines are not JSON objects and were left out", f"line {number}")


def text_of(value: Any) -> str | None:
    """Return a value as text, or None where there is none (missing, NaN, a list of several)."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if isinstance(value, (list, tuple)) and len(value) == 1:
        return text_of(value[0])
    return None


def field_name(name: str) -> str:
    """Return our name for a field that others call otherwise."""
    return next((ours for ours, theirs in _SYNONYMS.items() if name in theirs), name)


def same_question(first: str, second: str) -> bool:
    """Return whether two texts ask the same: one may have an instruction around the other."""
    ours, theirs = (
        " ".join(text.replace("<image>", " ").lower().split()) for text in (first, second)
    )
    return ours == theirs or (bool(ours) and bool(theirs) and (ours in theirs or theirs in ours))


def _whole(text: str) -> str:
    """Return a text without halves of characters, which no file can hold."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def field(row: Mapping[str, Any], name: str) -> Any:
    """Return a field under our name, or under one that others use."""
    if row.get(name) is not None:
        return row[name]
    for other in _SYNONYMS.get(name, ()):
        if row.get(other) is not None:
            return row[other]
    return None


def _is_closed(row: Mapping[str, Any], answer: str, problems: Problems, where: object) -> bool:
    stated = row.get("answer_type")
    if isinstance(stated, str) and stated.strip():
        kind = stated.strip().lower()
        if kind in _CLOSED:
            return True
        if kind in _OPEN:
            return False
        problems.add(f"items have the unknown answer_type '{kind[:20]}': told by the answer", where)
    return answer.strip().lower().rstrip(".").rstrip() in ("yes", "no")


class ItemReader:
    """Turns rows into items; keeps the header and counts what is odd."""

    def __init__(self, truth: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.problems = Problems()
        self.header: dict[str, Any] | None = None
        self.truth = truth
        self._seen: set[str] = set()
        self._num_rows = 0
        self._num_other_questions = 0

    def items(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Item]:
        """Yield the items that can be scored.

        Raises:
            CloverError: with a truth file of which no id, or hardly a question, agrees.
        """
        for row in rows:
            if "header" in row and "prediction" not in row:
                if self.header is None and isinstance(row["header"], dict):
                    self.header = row["header"]
                continue
            self._num_rows += 1
            if (item := self._item(row)) is not None:
                yield item
        self._check_truth()

    def _identity(self, row: Mapping[str, Any]) -> Any:
        """Return a row's id, or None for a second row of the same id."""
        identity = field(row, "id")
        if not isinstance(identity, (str, int)) or isinstance(identity, bool) or identity == "":
            if identity is not None:
                identity = json.dumps(identity, default=str)
            else:
                self.problems.add("items have no id: numbered by their line", self._num_rows)
                identity = f"line-{self._num_rows}"
        if isinstance(identity, str):
            identity = _whole(identity)
        key = str(identity)
        if key in self._seen:
            self.problems.add("items repeat an id and were left out: the first counts", key)
            return None
        self._seen.add(key)
        return identity

    def _item(self, row: Mapping[str, Any]) -> Item | None:
        identity = self._identity(row)
        if identity is None:
            return None
        gold: Mapping[str, Any] = row
        if self.truth is not None:
            found = self.truth.get(str(identity))
            if found is None:
                self.problems.add("ids are not in the truth file and were left out", identity)
                return None
            gold = found
            ours, theirs = text_of(field(row, "question")), text_of(field(gold, "question"))
            if ours and theirs and not same_question(ours, theirs):
                self._num_other_questions += 1
        answer = text_of(field(gold, "answer"))
        if answer is None:
            kind = (
                "no answer" if field(gold, "answer") is None else "an answer that is not one text"
            )
            self.problems.add(f"items have {kind} to compare with and were left out", identity)
            return None
        return self._complete(identity, row, gold, answer)

    def _complete(
        self, identity: Any, row: Mapping[str, Any], gold: Mapping[str, Any], answer: str
    ) -> Item:
        prediction = text_of(field(row, "prediction"))
        if prediction is None:
            self.problems.add(
                "items have no prediction that is one text: scored as empty", identity
            )
            prediction = ""
        image = text_of(field(gold, "image"))
        return Item(
            id=identity,
            question=text_of(field(gold, "question")) or "",
            answer=answer,
            is_closed=_is_closed(gold, answer, self.problems, identity),
            prediction=prediction,
            yes_no_answer=text_of(gold.get("yes_no_answer")),
            image=image if image is not None else text_of(field(row, "image")),
            form=text_of(gold.get("form")),
        )

    def _check_truth(self) -> None:
        if self.truth is None:
            return
        unknown = self.problems.counts["ids are not in the truth file and were left out"]
        known = len(self._seen) - unknown
        if self._seen and not known:
            raise CloverError(
                f"none of the {len(self._seen):,} prediction ids is among the {len(self.truth):,} "
                "of the truth file; is it the truth of another split or set?"
            )
        if self._num_other_questions * 2 > known:
            raise CloverError(
                f"the ids agree but {self._num_other_questions:,} of {known:,} questions differ "
                "from the truth file's; is it the truth of another split or set?"
            )
        if self._num_other_questions:
            kind = "items ask another question than the truth file: scored against it"
            self.problems.counts[kind] = self._num_other_questions
        if missing := len(self.truth) - known:
            self.problems.counts[
                f"of {len(self.truth):,} ids of the truth file have no prediction: not in n"
            ] = missing


def read_item(row: Mapping[str, Any]) -> Item | None:
    """Return one row as the scorer reads it by itself; None where it holds nothing to score."""
    return next(ItemReader().items([row]), None)


def spoken(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of LLaVA's form (`conversations`) with its first question and answer.

    Rows of other forms come back as they are.
    """
    turns = row.get("conversations") or row.get("conversatons")  # the published file's slip
    if not isinstance(turns, list) or field(row, "answer") is not None:
        return dict(row)
    said: dict[str, str] = {}
    for turn in turns:
        if isinstance(turn, Mapping) and isinstance(turn.get("value"), str):
            said.setdefault(str(turn.get("from")), turn["value"])
    question = said.get("human", "").replace("<image>", " ").strip()
    return {**row, "question": question, "answer": said.get("gpt")}


def read_truth(path: str | Path, problems: Problems) -> dict[str, dict[str, Any]]:
    """Read a truth file: rows with an id and an answer, or LLaVA's conversations, by id.

    Args:
        path: The file.
        problems: Counts what is odd in it.

    Raises:
        CloverError: no such file, or no row with an id.
    """
    truth: dict[str, dict[str, Any]] = {}
    for row in read_rows(path, problems):
        identity = field(row, "id")
        if identity is None:
            problems.add("lines of the truth file have no id and were left out")
        elif str(identity) in truth:
            problems.add("lines of the truth file repeat an id: the first counts", identity)
        else:
            truth[str(identity)] = spoken(row)
    if not truth:
        raise CloverError(f"{path} holds no line with an id; a truth line is id, question, answer")
    return truth
