"""One look over a record file before it costs anything, and over what it shares with another.

In: a record file or a folder of shards, its images, perhaps a second one. Out: a `Findings` to
print, and the list of what should be set aside, one JSON line each. Records stream; kept in memory
are the images' names and hashes and the groups' hashes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from clover.core.errors import CloverError
from clover.core.files import atomic_path, open_text
from clover.core.known import Census
from clover.core.record import Record, Rejection, lacking
from clover.core.record_file import RECORD_SUFFIXES, files_of_records, stream_records
from clover.core.tally import Tally
from clover.core.terminal import progress
from clover.core.text_file import windows_lines
from clover.slides.region import slide_of
from clover.vision.leaks import Leak, Reference
from clover.vision.pictures import look

_SHOWN = 5
_SEEN = 1000
"""Records whose columns are noted."""
_USED = ("image", "caption", "question", "answer")
_NOT_HISTOLOGY = frozenset({"not_histology", "non_histology", "is_not_histology"})
_HISTOLOGY = frozenset({"histology", "is_histology"})
_TRUE = frozenset({"1", "1.0", "true", "yes"})
_FALSE = frozenset({"0", "0.0", "false", "no"})


@dataclass
class Findings:
    """What a file holds and what is wrong with it."""

    num_records: int = 0
    num_pairs: int = 0
    """Records whose image is there and whole."""
    num_images: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    """By image: missing, empty, broken."""
    rejected: Counter[str] = field(default_factory=Counter)
    """By line: what is no record, ids given twice."""
    num_duplicates: int = 0
    num_grey: int = 0
    """Whole images with next to no colour."""
    flagged: Counter[str] = field(default_factory=Counter)
    """Records that their table says are no histology, by its column."""
    num_answered: int = 0
    """Questions with an answer."""
    columns: dict[str, None] = field(default_factory=dict)
    """Filled in the first records, by our names where they have one."""
    num_backslashes: int = 0
    """Missing images that are there with / in their names."""
    encoding: list[str] = field(default_factory=list)
    """A sentence on lines in an encoding that was guessed, where there are any."""
    num_repeated: int = 0
    """Captions that say what one before them says, word for word."""
    straddling: list[str] = field(default_factory=list)
    caption_words: Counter[int] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)
    closed_answers: Counter[str] = field(default_factory=Counter)
    census: Census = field(default_factory=Census)
    leaks: list[Leak] = field(default_factory=list)
    num_shared_groups: int = 0
    against: str | None = None
    """A sentence about the second file, where there is one."""

    @property
    def has_leaks(self) -> bool:
        """Return whether the two files share an image or a group."""
        return bool(self.leaks or self.num_shared_groups)

    def lines(self) -> list[str]:
        """Return what a person reads."""
        present = self.num_images - sum(self.problems.values())
        lines = [
            f"{present:,} of {self.num_images:,} images present; {self.num_pairs:,} pairs"
            f" of {self.num_records:,} records"
        ]
        lines += [f"{count:,} {reason}s" for reason, count in sorted(self.problems.items())]
        if self.num_backslashes:
            lines.append(
                f"{self.num_backslashes:,} of the missing are there with / for \\: "
                "clover data import records F --out G.jsonl writes them so"
            )
        if self.num_duplicates:
            lines.append(f"{self.num_duplicates:,} images have the bytes of another")
        lines += [f"{count:,} lines set aside: {why}" for why, count in self.rejected.items()]
        lines += self.encoding + self._lacking_lines() + self.census.lines()
        lines += _caption_lines(self.caption_words)
        if self.num_repeated:
            lines.append(
                f"{self.num_repeated:,} captions repeat one before, word for word: false negatives "
                "of each other in stage 1 (align.ignore_duplicates)"
            )
        lines += self._answer_lines() + self._histology_lines()
        named = ", ".join(f"{name} ({count:,})" for name, count in self.licences.most_common(5))
        lines.append(f"licences: {named}")
        if self.straddling:
            lines.append(
                f"{len(self.straddling):,} groups straddle splits: {_some(self.straddling)}"
            )
        return lines + self._leak_lines()

    def _lacking_lines(self) -> list[str]:
        """Return what `align` and `tune` would miss, where neither could start."""
        columns = list(self.columns)
        lines = []
        if not self.num_images and (missing := lacking(columns, "image")):
            lines.append(f"no images: {missing}")
        if self.caption_words or self.num_answered:
            return lines
        names = ("caption", "question", "answer")
        found = [missing for name in names if (missing := lacking(columns, name))]
        return [*lines, "nothing to train on: neither a caption nor a question with its answer"] + [
            f"  {missing}" for missing in found
        ]

    def _histology_lines(self) -> list[str]:
        lines = [
            f"{count:,} records are no histology by their column {column}"
            for column, count in self.flagged.items()
        ]
        if self.num_grey:
            lines.append(
                f"{self.num_grey:,} images without colour: blank, or not stained tissue "
                "(radiology, a drawing, print)"
            )
        return lines

    def _answer_lines(self) -> list[str]:
        yes, no = self.closed_answers["yes"], self.closed_answers["no"]
        if not self.closed_answers:
            return []
        other = sum(self.closed_answers.values()) - yes - no
        more = f", {other:,} neither" if other else ""
        share = f"; yes {100 * yes / (yes + no):.1f} %" if yes + no else ""
        return [f"closed answers: {yes:,} yes, {no:,} no{more}{share}"]

    def _leak_lines(self) -> list[str]:
        if self.against is None:
            return []
        of_slide = sum(leak.is_of_slide for leak in self.leaks)
        same = sum(leak.likeness is None for leak in self.leaks) - of_slide
        slides = f"{of_slide:,} of the same slide, " if of_slide else ""
        images = len({leak.image for leak in self.leaks})
        lines = [
            self.against,
            f"{len(self.leaks):,} leaks on {images:,} images ({same:,} same bytes, "
            f"{slides}{len(self.leaks) - same - of_slide:,} look alike); "
            f"{self.num_shared_groups:,} groups in both",
        ]
        shown = [f"  {leak.image}  {leak.other}  {leak.how()}" for leak in self.leaks[:_SHOWN]]
        if len(self.leaks) > _SHOWN:
            shown.append(f"  and {len(self.leaks) - _SHOWN:,} more: --out LIST writes them all")
        return lines + shown


def _caption_lines(words: Counter[int]) -> list[str]:
    total = sum(words.values())
    if not total:
        return []

    def at(share: float) -> int:
        passed = 0
        for length in sorted(words):
            passed += words[length]
            if passed >= share * total:
                return length
        return max(words)

    return [
        f"captions: {total:,}; words: {at(0.5)} in the middle, 9 in 10 at most {at(0.9)}, "
        f"longest {max(words)}"
    ]


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def check_file(
    path: Path,
    *,
    images: Path | None = None,
    against: Path | None = None,
    against_images: Path | None = None,
    out: Path | None = None,
) -> Findings:
    """Look a record file over.

    Args:
        path: The records: a file, or a folder of JSON Lines or Parquet files.
        images: Where its image paths start; its own folder by default.
        against: A second file, or folder, that should share nothing with it.
        against_images: Where the second file's image paths start.
        out: The list of what should be set aside, one JSON line each.

    Raises:
        CloverError: a file that cannot be read, a folder that is none, or a list that would
            overwrite a file to read.
    """
    for folder in (images, against_images):
        if folder is not None and not folder.is_dir():
            raise CloverError(f"no folder {folder}")
    if out is not None:
        for read in (path, against):
            if read is not None and read.exists():
                _refuse_as_out(out, read)
    check = _Check(path, images or _folder_of(path))
    second = None if against is None else _Second(against, against_images or _folder_of(against))
    if out is None:
        check.run(second, None)
    else:
        with atomic_path(out) as partial, open_text(partial) as listed:
            check.run(second, listed)
    return check.findings


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _refuse_as_out(out: Path, read: Path) -> None:
    """Refuse a list that would take the place of a file to read, or become a shard beside them."""
    if out.exists() and any(out.samefile(file) for file in files_of_records(read)):
        raise CloverError(f"--out would overwrite {out}; give the list another name")
    is_shard = out.suffix.lower() in RECORD_SUFFIXES
    if read.is_dir() and is_shard and out.resolve().is_relative_to(read.resolve()):
        raise CloverError(
            f"--out {out} would lie among the records of {read} and be read as some; write the "
            "list to another folder"
        )


def _group(record: Record) -> str | None:
    """Return the patient, slide or source image of a record; a region's is its slide."""
    named = record.group or record.image
    return slide_of(named) if named else None


def _shared_group(record: Record) -> str | None:
    """Return what `_group` does, but no plain image's name: two files may both have a 1.png."""
    found = _group(record)
    return found if record.group or found != record.image else None


class _Second:
    """The other file: its images and its groups."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        self.groups = Tally()
        names: dict[str, None] = {}
        for _, _, record in stream_records(path):
            if isinstance(record, Record):
                if record.image:
                    names.setdefault(record.image)
                if group := _shared_group(record):
                    self.groups.is_new(group)
        self.reference = Reference(names, folder)

    def sentence(self) -> str:
        """Return what it was compared with, and how much of that could not be."""
        lost = self.reference.num_unreadable
        missing = f" ({lost:,} of them missing or broken, not compared)" if lost else ""
        return f"against {self.path}: {self.reference.num_images:,} images{missing}"


class _Check:
    """The state of one check: a pass over the records, one over the images, one to list."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        self.folder = folder
        self.findings = Findings()
        self._uses: dict[str, int] = {}
        self._bad: dict[str, str] = {}
        self._splits: dict[str, str] = {}
        self._astride: dict[str, None] = {}
        self._captions = Tally()

    def run(self, second: _Second | None, listed: IO[str] | None) -> None:
        """Fill the findings, and write the list where one is asked for."""
        shared = Tally()
        for row in self._records():
            if isinstance(row, Rejection):
                _write(listed, row.row())
            elif second is not None:
                group = _shared_group(row)
                if group and group in second.groups:
                    shared.is_new(group)
        self._check_columns()
        self.findings.encoding = windows_lines(
            file for file in files_of_records(self.path) if file.suffix.lower() != ".parquet"
        )
        self.findings.straddling = list(self._astride)
        self.findings.num_shared_groups = len(shared)
        if second is not None:
            self.findings.against = second.sentence()
        self._look_at_images(second, listed)
        if listed is not None and (self._bad or self._astride or self.findings.flagged):
            self._list_records(listed)

    def _check_columns(self) -> None:
        """Refuse a table of which nothing is known."""
        found = self.findings
        if found.num_records and found.columns.keys().isdisjoint(_USED):
            raise CloverError(
                f"{self.path} has no column that is known (found: {', '.join(found.columns)}); "
                f"call them {', '.join(_USED)}"
            )

    def _records(self) -> Iterator[Record | Rejection]:
        found, ids = self.findings, Tally()
        for file, line, item in stream_records(self.path):
            rejected = item if isinstance(item, Rejection) else None
            if isinstance(item, Record) and not ids.is_new(item.id):
                rejected = Rejection(str(file), line, "duplicate id", {"id": item.id})
            if rejected is not None:
                found.rejected[rejected.reason] += 1
                yield rejected
            elif isinstance(item, Record):
                self._count(item)
                yield item

    def _count(self, record: Record) -> None:
        found = self.findings
        found.num_records += 1
        if found.num_records <= _SEEN:
            found.columns.update(dict.fromkeys(name for name in record.row() if name != "id"))
        found.num_answered += bool(record.question and record.answer)
        found.census.add(record)
        found.licences[record.licence or "none named"] += 1
        if record.caption:
            words = record.caption.split()
            found.caption_words[len(words)] += 1
            found.num_repeated += not self._captions.is_new(" ".join(words).lower())
        if column := not_histology(record):
            found.flagged[column] += 1
        if record.answer_type == "closed":
            found.closed_answers[(record.answer or "").strip().lower().rstrip(".")] += 1
        if record.image:
            self._uses[record.image] = self._uses.get(record.image, 0) + 1
        group = _group(record)
        if group and record.split and self._splits.setdefault(group, record.split) != record.split:
            self._astride.setdefault(group)

    def _look_at_images(self, second: _Second | None, listed: IO[str] | None) -> None:
        found = self.findings
        first_with: dict[str, str] = {}
        found.num_images = len(self._uses)
        with progress("images", len(self._uses)) as advance:
            for name, uses in self._uses.items():
                picture = look(self.folder / name, with_portrait=second is not None)
                advance()
                if picture.problem is not None:
                    self._bad[name] = picture.problem
                    found.problems[picture.problem] += 1
                    slashed = name.replace("\\", "/")
                    if slashed != name and (self.folder / slashed.partition("#")[0]).is_file():
                        found.num_backslashes += 1
                    continue
                found.num_pairs += uses
                if picture.is_grey:
                    found.num_grey += 1
                    content = {"image": name}
                    _write(
                        listed, Rejection(str(self.path), 0, "image without colour", content).row()
                    )
                twin = first_with.setdefault(picture.digest, name) if picture.digest else name
                if twin != name:
                    found.num_duplicates += 1
                    content = {"image": name, "other": twin}
                    _write(listed, Rejection(str(self.path), 0, "duplicate image", content).row())
                for leak in [] if second is None else second.reference.leaks(name, picture):
                    found.leaks.append(leak)
                    _write(listed, leak.row(self.path))

    def _list_records(self, listed: IO[str]) -> None:
        """Write each record whose image is bad or whose group stands in two splits."""
        for file, line, item in stream_records(self.path):
            if not isinstance(item, Record):
                continue
            reason = self._bad.get(item.image or "")
            if reason is None and _group(item) in self._astride:
                reason = "group straddles splits"
            if reason is None and not_histology(item):
                reason = "no histology by its table"
            if reason is not None:
                content = {"id": item.id, "image": item.image, "group": item.group}
                _write(listed, Rejection(str(file), line, reason, content).row())


def not_histology(record: Record) -> str | None:
    """Return the column in which a record's table says that it shows no histology, if it does.

    Quilt-1M has such a column; other tables name it in their own way.
    """
    for column, value in (record.model_extra or {}).items():
        name = column.lower().replace("-", "_").replace(" ", "_")
        if name in _NOT_HISTOLOGY and str(value).strip().lower() in _TRUE:
            return column
        if name in _HISTOLOGY and str(value).strip().lower() in _FALSE:
            return column
    return None


def _write(listed: IO[str] | None, row: dict[str, Any]) -> None:
    if listed is not None:
        listed.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
