"""The one record type: an image with a caption, or with a question and its answer.

In: JSON Lines, JSON lists or CSV, as people have them. Out: `Record`s, and a list of what was set
aside with the reason. Column names other than ours are recognised from a short list; any further
column is kept.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from clover.core.errors import CloverError, nearest
from clover.core.files import write_jsonl
from clover.core.run import uncollected
from clover.core.table import Misfit, table_rows
from clover.core.text_file import json_lines, open_text

AnswerType = Literal["open", "closed"]
Needs = Literal["caption", "question", "any"]

# What other people call our columns. The first that is present is taken, and one in other capitals
# only after all of them: replies that were paid for are found again by a record's id and words.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "id": ("question_id", "qid", "uuid"),
    "image": ("image_path", "path", "img", "file", "filename", "file_name", "image_file"),
    "caption": ("text", "description", "report", "captions"),
    "question": ("sent", "q", "instruction"),
    "answer": ("a", "label", "response", "output"),
    "licence": ("license",),
}
_LINES = (".jsonl", ".ndjson", "")
_READ_HERE = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_IMPORTED = (".parquet", ".gz", ".pkl", ".pickle")
"""What only `clover data import` reads in any place."""


class Record(BaseModel):
    """One line of data.

    `image` is a path relative to the file's folder (or to `--images`), or
    ``slide.svs#x,y,width_um,height_um``. Unknown columns are kept as extra fields.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    id: str
    image: str | None = None
    caption: str | None = None
    question: str | None = None
    answer: str | None = None
    answer_type: AnswerType | None = None
    source: str | None = None
    licence: str | None = None
    split: str | None = None
    group: str | None = None
    origin: str | None = None
    """How the instruction was made: template, generated, truth, human."""

    @field_validator("id", mode="before")
    @classmethod
    def _text_id(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value

    @field_validator("answer_type", mode="before")
    @classmethod
    def _lower_type(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) and value else value or None

    def row(self) -> dict[str, Any]:
        """Return the JSON-able form, without empty fields."""
        return self.model_dump(mode="json", exclude_none=True)


_OURS = tuple(Record.model_fields)
NAMES = frozenset((*_OURS, *(name for names in SYNONYMS.values() for name in names)))
"""Our columns and what other people call them."""


@dataclass(frozen=True)
class Rejection:
    """A line that was set aside, and why."""

    source: str
    line: int
    reason: str
    content: Any = None

    def row(self) -> dict[str, Any]:
        """Return the JSON-able form."""
        return {
            "source": self.source,
            "line": self.line,
            "reason": self.reason,
            "content": self.content,
        }


def set_aside(rejected: Sequence[Rejection]) -> str:
    """Return ``; 3 set aside (2 missing image, 1 empty caption)``, or nothing for none."""
    if not rejected:
        return ""
    reasons = Counter(item.reason for item in rejected)
    listed = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    return f"; {len(rejected):,} set aside ({listed})"


@dataclass
class RecordSet:
    """Records read from one file, and what was set aside."""

    path: Path
    records: list[Record]
    rejected: list[Rejection] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The folder that relative image paths start from."""
        return self.path.parent

    def summary(self) -> str:
        """Return ``1,200 records`` and, when lines were set aside, how many and why."""
        return f"{len(self.records):,} records{set_aside(self.rejected)}"


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, parsed row or an exception's text) from a JSONL, JSON or CSV file."""
    kind = path.suffix.lower()
    is_unknown = kind not in (*_LINES, *_READ_HERE) and path.exists()
    if path.is_dir() or (is_unknown and not _begins_as_lines(path)):
        raise _no_reader(path)
    try:
        if kind in {".csv", ".tsv"}:
            yield from table_rows(path, NAMES)
        elif kind == ".json":
            yield from enumerate(_json_list(path), start=1)
        else:
            yield from json_lines(path)
    except FileNotFoundError as error:
        raise CloverError(f"no file {path}") from error


def _json_list(path: Path) -> list[Any]:
    with open_text(path) as handle:
        try:
            rows = json.load(handle)
        except (ValueError, RecursionError) as error:
            raise CloverError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise CloverError(f"{path} is not a JSON list of records; use .jsonl or a list")
    return rows


def _begins_as_lines(path: Path) -> bool:
    """Return whether a file of another ending holds JSON Lines, or nothing, as far as one sees."""
    with path.open("rb") as handle:
        start = handle.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return start[:1] in (b"{", b"")


def _no_reader(path: Path) -> CloverError:
    known = ", ".join(_READ_HERE)
    if not path.is_dir() and path.suffix.lower() not in _IMPORTED:
        return CloverError(f"{path}: no reader for '{path.suffix}'; known: {known}")
    what = "a folder" if path.is_dir() else f"a '{path.suffix}' file"
    return CloverError(
        f"{path} is {what}; here one file is read ({known}): "
        f"clover data import records {shlex.quote(str(path))} --out F.jsonl"
    )


@lru_cache(maxsize=256)
def _stand_ins(columns: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Return which columns of a row may hold each of ours, the first choice first."""
    found = {ours: (*_exact(ours, columns), *_variants(ours, columns)) for ours in _OURS}
    return {ours: others for ours, others in found.items() if others}


def _exact(ours: str, columns: tuple[str, ...]) -> list[str]:
    return [name for name in SYNONYMS.get(ours, ()) if name in columns]


def _variants(ours: str, columns: tuple[str, ...]) -> list[str]:
    """Return the columns that are a name of ours but for their capitals."""
    # A Label may be a class and a lone A is a choice of four: neither is an answer.
    names = (ours,) if ours == "answer" else (ours, *SYNONYMS.get(ours, ()))
    return [
        column
        for name in names
        for column in columns
        if len(name) > 1 and isinstance(column, str) and column != name and column.lower() == name
    ]


def holds_other_case(columns: Iterable[str]) -> bool:
    """Return whether a column is one of ours, or a usual one, but for its capital letters."""
    return any(column not in NAMES and column.lower() in NAMES for column in columns)


def _rename(row: dict[str, Any]) -> dict[str, Any]:
    for ours, others in _stand_ins(tuple(row)).items():
        if row.get(ours) in (None, ""):
            for other in others:
                value = row.get(other)
                if value not in (None, "") and (other in NAMES or _is_ours(ours, value)):
                    row[ours] = row.pop(other)
                    break
    return {key: value for key, value in row.items() if value is not None and value != ""}


def _is_ours(ours: str, value: Any) -> bool:
    """Return whether a column in other capitals is ours by its value."""
    if ours == "answer_type":
        return isinstance(value, str) and value.lower() in get_args(AnswerType)
    # Group: 3 in capitals is somebody's own column, not our text.
    return ours == "id" or isinstance(value, str)


def _problem(record: Record, needs: Needs) -> str | None:
    """Return why a record cannot be used, or None."""
    if record.image and (reason := _name_problem(record.image)):
        return reason
    if needs == "caption" and not (record.caption or "").strip():
        return "empty caption"
    if needs == "question":
        if not (record.question or "").strip():
            return "empty question"
        if not (record.answer or "").strip():
            return "empty answer"
        if record.answer_type == "closed" and is_unusable_closed(record.answer or ""):
            return "closed question answered with prose"
    return None


def _name_problem(image: str) -> str | None:
    """Return why no stage can open or write down an image's name, or None."""
    if "\0" in image:
        return "image name with a NUL"
    try:
        image.encode()
    except UnicodeEncodeError:  # bytes of another encoding, as Python reads them from a folder
        return "image name that is not UTF-8"
    return None


def is_unusable_closed(answer: str) -> bool:
    """Return whether the answer to a closed question begins with neither yes nor no."""
    words = answer.strip().lower().split()
    return not words or words[0].strip(".,;:!") not in ("yes", "no")


def check_columns(path: Path, columns: Sequence[str], needs: Needs) -> None:
    """Refuse a file without the columns that are needed.

    Raises:
        CloverError: with the nearest of those it has.
    """
    wanted = {"any": (), "caption": ("caption",), "question": ("question", "answer")}[needs]
    for name in wanted:
        if missing := lacking(columns, name):
            if not columns:
                is_empty = not path.stat().st_size
                what = "the file is empty" if is_empty else "no row stands below its header"
                raise CloverError(f"{path} has no '{name}' column: {what}")
            raise CloverError(f"{path} has {missing}")


def lacking(columns: Sequence[str], name: str) -> str | None:
    """Return ``no 'caption' column (found: image, captoin); did you mean 'captoin'?``, or None."""
    if name in columns or name in _stand_ins(tuple(columns)):
        return None
    hint = nearest(name, columns)
    if "did you mean" not in hint:
        hint = f"; call it one of {', '.join((name, *SYNONYMS[name]))}"
    return f"no '{name}' column (found: {', '.join(columns)}){hint}"


def iterate_records(path: str | Path, *, needs: Needs = "any") -> Iterator[Record | Rejection]:
    """Yield records one at a time, and what is set aside among them: for files of any size.

    Raises:
        CloverError: no such file, no such column, or not one good record; the latter two at the
            end of the file.
    """
    for _, item in numbered_records(Path(path), needs):
        yield item


def numbered_records(path: Path, needs: Needs) -> Iterator[tuple[int, Record | Rejection]]:
    """Yield what `iterate_records` does, each with its line in the file.

    Raises:
        CloverError: see `iterate_records`.
    """
    columns: dict[str, None] = {}
    reasons: Counter[str] = Counter()
    good = 0
    for line, row in _rows(path):
        item = read_row(path, line, row, needs)
        if isinstance(row, dict):
            columns.update(dict.fromkeys(row))
        if isinstance(item, Record):
            good += 1
        else:
            reasons[item.reason] += 1
        yield line, item
    if columns or not reasons:
        check_columns(path, list(columns), needs)
    if not good:
        raise no_usable_record(path, reasons)


def no_usable_record(path: Path, reasons: Counter[str]) -> CloverError:
    """Return the error for a file or folder of which every line was set aside, and why."""
    listed = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    return CloverError(f"{path} holds no usable record: {listed or 'it is empty'}")


def read_row(
    path: Path, line: int, row: Any, needs: Needs, *, name: str | None = None
) -> Record | Rejection:
    """Return one row of a file as a record, or why it is set aside.

    Args:
        path: Where the row stands.
        line: Its line there.
        row: The parsed row; usual column names other than ours are recognised.
        needs: Which columns it must fill.
        name: Names the record, with its line, when it has no id; the file's own by default.
    """
    if isinstance(row, Misfit):
        return Rejection(str(path), line, row.reason, row.cells)
    if not isinstance(row, dict):
        return Rejection(str(path), line, "not a JSON object", row)
    row = _rename(dict(row))
    if "id" not in row:
        row["id"] = f"{name or path.stem}-{line}"
    try:
        record = Record.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"bad {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
        return Rejection(str(path), line, reason, row)
    reason_text = _problem(record, needs)
    if reason_text is not None:
        return Rejection(str(path), line, reason_text, record.row())
    return record


def read_records(path: str | Path, *, needs: Needs = "any", limit: int | None = None) -> RecordSet:
    """Read records from `.jsonl`, `.json`, `.csv` or `.tsv`.

    Args:
        path: The file.
        needs: Which columns each record must fill: a caption, or a question with its answer.
        limit: Stop after this many good records.

    Returns:
        The good records, and every line that was set aside with its reason.

    Raises:
        CloverError: no such file, no such column, or not one good record.
    """
    path = Path(path)
    found = RecordSet(path, [])
    seen: set[str] = set()
    with uncollected():
        for line, item in numbered_records(path, needs):
            if isinstance(item, Rejection):
                found.rejected.append(item)
            elif item.id in seen:
                found.rejected.append(Rejection(str(path), line, "duplicate id", item.row()))
            else:
                seen.add(item.id)
                found.records.append(item)
                if limit is not None and len(found.records) >= limit:
                    break
    return found


def write_records(path: str | Path, records: Iterable[Record]) -> int:
    """Write records as JSON Lines, atomically; return how many."""
    return write_jsonl(path, (record.row() for record in records))


def write_rejected(path: str | Path, rejected: Sequence[Rejection]) -> None:
    """Write what was set aside, one JSON line each; nothing is written for an empty list."""
    if rejected:
        write_jsonl(path, (item.row() for item in rejected))


def image_path(record: Record, folder: Path) -> Path:
    """Return the path of a record's image under `folder`.

    Raises:
        CloverError: the record names no image, or a path that leaves the folder.
    """
    if not record.image:
        raise CloverError(f"record {record.id} names no image")
    return folder / record.image
