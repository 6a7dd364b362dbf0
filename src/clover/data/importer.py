"""One import: rows of a source become records in a file, with what was set aside beside it.

In: a source's name and a path. Out: F (JSON Lines), `F.rejected.jsonl` where something was set
aside, and a `Summary`. Rows stream: a million need no more memory than one, but for 8 bytes an
image name.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from clover.core.errors import CloverError
from clover.core.files import atomic_path, check_out, open_text, write_jsonl
from clover.core.known import Census
from clover.core.record import Needs, Record, Rejection, lacking, read_row
from clover.core.tally import Tally
from clover.core.terminal import progress
from clover.core.text_file import windows_lines
from clover.data.images import Ambiguous, ImageFinder
from clover.data.lines import Line, read_lines, text_files_of
from clover.data.source import AUTO, READERS, check_name, recognise
from clover.data.source.base import Options, Subset

_NEEDS: dict[str, Needs] = {"quilt1m": "caption", "records": "any"}


@dataclass
class Summary:
    """What one import did."""

    source: str
    out: Path
    num_records: int = 0
    num_left_out: int = 0
    num_broken: int = 0
    images: Tally = field(default_factory=Tally)
    present: Tally = field(default_factory=Tally)
    rejected: Counter[str] = field(default_factory=Counter)
    census: Census = field(default_factory=Census)
    encoding: list[str] = field(default_factory=list)
    """A sentence on lines in an encoding that was guessed, where there are any."""

    def lines(self) -> list[str]:
        """Return what a person reads."""
        left_out = f"; {self.num_left_out:,} left out by --subset" if self.num_left_out else ""
        lines = [f"{self.source}: {self.num_records:,} records in {self.out}{left_out}"]
        lines += self.census.lines() + self.encoding
        if len(self.images):
            lines.append(f"{len(self.present):,} of {len(self.images):,} images found")
        if self.num_broken:
            lines.append(f"{self.num_broken:,} images in zip files could not be unpacked")
        if self.rejected:
            reasons = ", ".join(f"{count:,} {why}" for why, count in self.rejected.most_common())
            total = sum(self.rejected.values())
            lines.append(f"{total:,} set aside ({reasons}): {rejected_path(self.out)}")
        return lines


def rejected_path(out: Path) -> Path:
    """Return where the rows that were set aside are listed."""
    return out.with_name(f"{out.name}.rejected.jsonl")


def import_file(
    source: str,
    path: Path,
    *,
    out: Path,
    images: Sequence[Path] = (),
    options: Options | None = None,
) -> Summary:
    """Read a source's file or folder and write its records.

    Args:
        source: A name of `source.READERS`, or ``auto``.
        path: The file, or the folder of its shards.
        out: The JSON Lines file to write.
        images: Folders and zip files to look for images in; by default where `path` lies.
        options: Subset, text column, truth file.

    Raises:
        CloverError: an unknown source, a file that cannot be read, or not one usable record.
    """
    check_name(source)
    if out.suffix.lower() not in (".jsonl", ".ndjson"):
        raise CloverError(f"records are JSON Lines: call --out {out.with_suffix('.jsonl')}")
    check_out(out, path, beside=("rejected.jsonl",))
    lines = read_lines(path)
    head: list[Line] = []
    for line in lines:  # the form shows in the first row that is one
        head.append(line)
        if isinstance(line.row, dict):
            break
    if not head:
        raise CloverError(f"{path} holds no row")
    name = recognise(head[-1]) if source == AUTO else source
    roots = images or [path if path.is_dir() else path.parent]
    finder = ImageFinder(roots, out=out)
    try:
        run = _Import(name, Summary(name, out), finder)
        run.write(itertools.chain(head, lines), options or Options())
        if finder.num_contested:
            # Once more, now that it is known which pictures two names claim: rare.
            finder.num_broken = 0
            run = _Import(name, Summary(name, out), finder)
            run.write(read_lines(path), options or Options())
    finally:
        finder.close()
    run.summary.encoding = windows_lines(text_files_of(path))
    return run.summary


class _Import:
    """The state of one import."""

    def __init__(self, name: str, summary: Summary, finder: ImageFinder) -> None:
        self.name = name
        self.summary = summary
        self.finder = finder
        self.columns: dict[str, None] = {}
        """Of the rows without a caption or a question."""

    def write(self, lines: Iterator[Line], options: Options) -> None:
        """Write the records, and what is set aside."""
        subset = Subset(options.subset)
        rejected = rejected_path(self.summary.out)
        with atomic_path(rejected) as partial, open_text(partial) as aside:
            made = READERS[self.name](subset.chosen(lines), options)
            self.summary.num_records = write_jsonl(self.summary.out, self._rows(made, aside))
        self.summary.num_left_out = subset.num_left_out
        self.summary.num_broken = self.finder.num_broken
        if not self.summary.rejected:
            rejected.unlink()

    def _rows(self, lines: Iterator[Line], aside: IO[str]) -> Iterator[dict[str, Any]]:
        good = 0
        with progress("import", None) as advance:
            for line in lines:
                item = self._record(line)
                if isinstance(item, Rejection):
                    self.summary.rejected[item.reason] += 1
                    aside.write(json.dumps(item.row(), ensure_ascii=False, default=str) + "\n")
                else:
                    good += 1
                    self.summary.census.add(item)
                    yield item.row()
                if line.number % 1000 == 0:
                    advance(1000)
        if not good:
            reasons = ", ".join(f"{count:,} {why}" for why, count in self.summary.rejected.items())
            missing = lacking(list(self.columns), "caption") if self.columns else None
            raise CloverError(
                f"no usable record ({self.name}): {reasons or 'no row was chosen'}"
                + (f"; {missing}" if missing else "")
            )

    def _record(self, line: Line) -> Record | Rejection:
        row = line.row
        kept: str | Ambiguous | None = None
        if isinstance(row, dict):
            row = {key: value for key, value in row.items() if value is not None}
            if isinstance(row.get("image"), dict):
                cell = row.pop("image")
                kept = self.finder.keep(cell)
                row["image"] = kept if isinstance(kept, str) else cell.get("path") or ""
        item = read_row(line.path, line.number, row, _NEEDS.get(self.name, "question"))
        if isinstance(item, Rejection):
            return item
        if item.caption is None and item.question is None:
            self.columns.update(dict.fromkeys(name for name in item.row() if name != "id"))
            return Rejection(str(line.path), line.number, "no caption and no question", item.row())
        return self._placed(item, line, kept)

    def _placed(
        self, record: Record, line: Line, kept: str | Ambiguous | None
    ) -> Record | Rejection:
        """Return a record whose image is named from the written file's folder, if it is there."""
        if record.image is None:
            return record
        self.summary.images.is_new(record.image)
        found = kept or self.finder.find(record.image, record.split)
        if found is None:
            return record
        if isinstance(found, Ambiguous):
            content = {**record.row(), "could_be": found.places}
            return Rejection(str(line.path), line.number, "ambiguous image name", content)
        self.summary.present.is_new(record.image)
        return record.model_copy(update={"image": found})
