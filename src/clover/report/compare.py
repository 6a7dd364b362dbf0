"""Case studies: several models' answers to the same image and question, side by side, filtered.

In: prediction files, or run folders with one. Out: one page that needs nothing else: every image
once, beneath it its questions with a column a model, and filters by disagreement, by question form
and by who is right.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clover import __version__
from clover.core.errors import CloverError
from clover.core.files import write_text
from clover.evaluate.item import Problems, read_rows, text_of
from clover.evaluate.item import field as field_of
from clover.report.example import Judgement, embedded, judge, short
from clover.report.figure import decimal
from clover.report.reading import Row
from clover.report.template import fill


@dataclass
class Speaker:
    """One model's predictions by id."""

    name: str
    path: Path
    rows: dict[str, Row] = field(default_factory=dict)
    num_damaged: int = 0


@dataclass(frozen=True)
class Case:
    """One question, and how each model answered it."""

    row: Row
    answers: list[str]
    judgements: list[Judgement]

    @property
    def right(self) -> list[int]:
        """The places of the models that are right."""
        return [at for at, found in enumerate(self.judgements) if found.kind == "right"]

    @property
    def differs(self) -> str:
        """`verdict` where some are right and some not, `words` where only words differ."""
        if 0 < len(self.right) < len(self.judgements):
            return "verdict"
        forms = {" ".join(answer.lower().split()).rstrip(".") for answer in self.answers}
        return "words" if len(forms) > 1 else "no"

    @property
    def form(self) -> str:
        """The question's form, or that it has none."""
        return str(self.row.get("form") or "without a form").replace("_", " ")

    @property
    def kind(self) -> str:
        """`closed` or `open`, as the scorer tells it."""
        return "closed" if self.judgements[0].is_closed else "open"


def write_compared(
    paths: Sequence[Path], out: Path, *, images: Path | None = None, limit: int = 400
) -> Path:
    """Write the page; return where it is.

    Args:
        paths: Prediction files or run folders, two at least, the columns' order.
        out: The page.
        images: Where the predictions' image paths start from; found beside the files without it.
        limit: Questions on the page; those that the models disagree about come first.

    Raises:
        CloverError: fewer than two files, one that cannot be read, or no question in all of them.
    """
    if len(paths) < 2:
        raise CloverError(f"{len(paths)} prediction file; a comparison needs two or more")
    speakers = [read_speaker(Path(path)) for path in paths]
    for at, speaker in enumerate(speakers):
        if [other.name for other in speakers].count(speaker.name) > 1:
            speaker.name = f"{speaker.name} ({at + 1}: {speaker.path.stem})"
    cases = shared_cases(speakers)
    shown = choose(cases, limit)
    places = _image_places(speakers, images)
    page = fill(
        "compare.html.jinja",
        names=[speaker.name for speaker in speakers],
        tally=_tally(speakers, cases),
        num_cases=len(cases),
        num_shown=len(shown),
        num_verdict=sum(case.differs == "verdict" for case in cases),
        num_words=sum(case.differs == "words" for case in cases),
        left_out=[
            (speaker.name, len(speaker.rows) - len(cases), speaker.num_damaged)
            for speaker in speakers
        ],
        forms=sorted({case.form for case in shown}),
        images=list(_by_image(shown, places)),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
    )
    write_text(out, page)
    return out


def read_speaker(path: Path) -> Speaker:
    """Read a prediction file as the scorer reads it, or a run folder's; damage is counted.

    Raises:
        CloverError: no such file, or no line with an id and a prediction.
    """
    if path.is_dir():
        places = (path / "evaluation" / "predictions.jsonl", path / "predictions.jsonl")
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise CloverError(f"{path} holds no predictions.jsonl; `clover evaluate` writes it")
        path = found
    if not path.is_file():
        raise CloverError(f"no prediction file {path}")
    speaker, problems = Speaker(path.stem, path), Problems()
    for row in read_rows(path, problems):
        _take(speaker, row)
    speaker.num_damaged += sum(
        count for kind, count in problems.counts.items() if kind.endswith("left out")
    )
    if not speaker.rows:
        raise CloverError(f"{path} holds no line with an id, a question and a prediction")
    return speaker


def _take(speaker: Speaker, row: Row) -> None:
    """Keep a row under the names that the scorer knows its fields by."""
    if isinstance(row.get("header"), dict):
        model, view = row["header"].get("model"), row["header"].get("view", "image")
        if model:
            speaker.name = str(model) if view == "image" else f"{model}, {view}"
        return
    identity = field_of(row, "id")
    if identity is None or str(identity) in speaker.rows:
        speaker.num_damaged += 1
        return
    texts = {name: text_of(field_of(row, name)) for name in ("question", "answer", "prediction")}
    known = {name: text for name, text in texts.items() if text is not None}
    speaker.rows[str(identity)] = {**row, "prediction": "", **known}


def shared_cases(speakers: Sequence[Speaker]) -> list[Case]:
    """Return the questions that every file answers, in the first file's order.

    Raises:
        CloverError: there are none, or under the same ids other questions are asked.
    """
    first = speakers[0].rows
    ids = [key for key in first if all(key in other.rows for other in speakers[1:])]
    if not ids:
        raise CloverError(
            f"no id is in all {len(speakers)} files; predictions for the same questions are needed"
        )
    cases = []
    for key in ids:
        rows = [speaker.rows[key] for speaker in speakers]
        asked = {" ".join(str(row["question"]).split()) for row in rows if row.get("question")}
        if len(asked) > 1:
            raise CloverError(
                f"id {key} is “{short(sorted(asked)[0])}” in one file and “"
                f"{short(sorted(asked)[1])}” in another; these are not the same questions"
            )
        truth = next((row for row in rows if row.get("answer")), rows[0])
        gold, answers = {**rows[0], **truth}, [row["prediction"] for row in rows]
        judged = [judge({**gold, "prediction": answer}) for answer in answers]
        cases.append(Case(gold, answers, judged))
    return cases


def choose(cases: Sequence[Case], limit: int) -> list[Case]:
    """Return so many cases: disputed ones first, of each kind one of every form in turn."""
    chosen: list[Case] = []
    for wanted in ("verdict", "words", "no"):
        forms: dict[tuple[str, str], list[Case]] = defaultdict(list)
        for case in cases:
            if case.differs == wanted:
                forms[case.form, case.kind].append(case)
        depth = 0
        while len(chosen) < limit and any(len(found) > depth for found in forms.values()):
            turn = [found[depth] for found in forms.values() if len(found) > depth]
            chosen += turn[: limit - len(chosen)]
            depth += 1
    return chosen


def _tally(speakers: Sequence[Speaker], cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Return for each model how many it has right, and right alone."""
    rows = []
    for at, speaker in enumerate(speakers):
        right = [case for case in cases if at in case.right]
        num_scored = sum(case.judgements[at].share is not None for case in cases)
        rows.append(
            {
                "name": speaker.name,
                "file": speaker.path.name,
                "right": len(right),
                "share": decimal(100 * len(right) / num_scored if num_scored else None),
                "alone": sum(len(case.right) == 1 for case in right),
                "wrong_alone": sum(
                    at not in case.right and len(case.right) == len(speakers) - 1 for case in cases
                ),
            }
        )
    return rows


def _image_places(speakers: Sequence[Speaker], images: Path | None) -> list[Path]:
    if images is not None:
        return [images]
    places: list[Path] = []
    for speaker in speakers:
        folder = speaker.path.resolve().parent
        places += [folder, folder.parent]
        places += [folder.parent / "phantom-validation", folder.parent / "phantom"]
    return list(dict.fromkeys(places))


def _by_image(cases: Sequence[Case], places: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Yield each image once with its questions."""
    groups: dict[str, list[Case]] = defaultdict(list)
    for at, case in enumerate(cases):
        groups[str(case.row.get("image") or f"\0{at}")].append(case)
    for name, found in groups.items():
        has_name = not name.startswith("\0")
        path = next((p / name for p in places if has_name and (p / name).is_file()), None)
        yield {
            "name": name if has_name else "no image named",
            "picture": None if path is None else embedded(path),
            "cases": [
                {
                    "form": case.form,
                    "kind": case.kind,
                    "differs": case.differs,
                    "right": " ".join(map(str, case.right)),
                    "question": short(case.row.get("question")),
                    "truth": short(case.row.get("answer")),
                    "answers": [
                        (short(answer), judgement)
                        for answer, judgement in zip(case.answers, case.judgements, strict=True)
                    ],
                }
                for case in found
            ],
        }
