"""Predictions: answers in a file that anybody can score again without a GPU.

The first line is a header (model and its hash, prompt, decoding, data, view); a prediction's line
repeats the question and the gold answer. The file grows while it is made; the same call continues
it, and asks nothing that was answered.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from clover.core.files import fingerprint, growing, whole_lines, write_jsonl
from clover.core.record import Record
from clover.core.terminal import progress
from clover.evaluate.decoding import Decoding
from clover.evaluate.view import FeatureViewer, View, Viewer
from clover.model import Clover
from clover.vision.dataset import FeatureSet
from clover.vision.leaks import Pictured
from clover.vision.turned import num_turns

Row = dict[str, Any]
NOTICE = "research use only, not for diagnosis"


class Respondent(Protocol):
    """Whoever answers: a model of ours, or one behind an endpoint."""

    def identity(self) -> Row:
        """Return what the header says of it: model, hash, prompt, decoding."""
        ...

    def viewer(self, view: View) -> Viewer:
        """Return the questions as this respondent is shown them in a view."""
        ...

    def answers(self, viewer: Viewer, indices: Sequence[int]) -> Iterator[tuple[int, str]]:
        """Yield (index, answer) in any order, as they come."""
        ...


@dataclass(frozen=True)
class LocalModel:
    """A model folder of ours, asked in batches."""

    model: Clover
    data: FeatureSet
    decoding: Decoding
    batch_size: int
    model_key: str = ""
    model_hash: str | None = None
    seed: int = 0

    def identity(self) -> Row:
        """Return what the header says of it."""
        return {
            "model": self.model.name,
            "model_key": self.model_key,
            "model_hash": self.model_hash,
            "prompt": self.model.recipe.prompt.model_dump(),
            "decoding": self.decoding.row(),
            # As they are by default they stand in no header: predictions from before are read.
            **({"word_pull": share} if (share := self.model.word_pull) else {}),
            **({"turns": turns} if (turns := num_turns(self.model.encoder)) > 1 else {}),
        }

    def viewer(self, view: View) -> FeatureViewer:
        """Return the questions and their image tokens in a view."""
        return FeatureViewer(self.data, self.model.encoder, view=view, seed=self.seed)

    def answers(self, viewer: Viewer, indices: Sequence[int]) -> Iterator[tuple[int, str]]:
        """Yield (index, answer), questions of like length together."""
        assert isinstance(viewer, FeatureViewer)
        records = self.data.records

        def place(index: int) -> tuple[Any, ...]:
            # The shorter ones are padded least. Where images are encoded anew, those about one
            # image stay together instead: it is encoded once and then forgotten.
            image = viewer.key(index) if viewer.changes_pixels else ""
            return image, len(records[index].question or ""), index

        order = sorted(indices, key=place)
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            texts = self.model.answer_features(
                viewer.features(part),
                [self._put(viewer, index) for index in part],
                self.decoding.settings,
                choices=[self.decoding.choices(records[index]) for index in part],
            )
            yield from zip(part, texts, strict=True)

    def _put(self, viewer: Viewer, index: int) -> str:
        record = self.data.records[index]
        question = viewer.question(index) or record.question
        return self.model.question_of(record.model_copy(update={"question": question}))


@dataclass(frozen=True)
class PredictionJob:
    """What is asked, and whom."""

    respondent: Respondent
    data: Pictured
    seed: int = 0

    def header(self, view: View) -> Row:
        """Return the header line of a predictions file."""
        asked = [[record.id, record.question] for record in self.data.records]
        return {
            "header": {
                **self.respondent.identity(),
                "view": view,
                "data": fingerprint([asked, self.data.digests]),
                "seed": self.seed,
                "notice": NOTICE,
            }
        }


def row_of(record: Record, prediction: str, asked: str | None = None) -> Row:
    """Return a prediction's line; `asked` is the question where it was put in other words."""
    row = record.row()
    kept = ("id", "image", "group", "question", "answer", "answer_type", "form", "yes_no_answer")
    line = {key: row[key] for key in kept if key in row}
    if asked is not None and asked != record.question:
        line["asked"] = asked
    return line | {"prediction": prediction}


def predict(
    job: PredictionJob, path: Path, *, view: View = "image", indices: Sequence[int] | None = None
) -> list[Row]:
    """Answer every question, or those at `indices`, and write `path`.

    Equal questions about equal images are asked once: in the blind view that is once a question.
    A file that is finished already, by the same respondent about the same data, is read.

    Returns:
        The predictions' lines, in the data's order; without questions that the view cannot put.
    """
    records = job.data.records
    viewer = job.respondent.viewer(view)
    wanted = range(len(records)) if indices is None else indices
    asked = {i: question for i in wanted if (question := viewer.question(i)) is not None}
    header = json.loads(json.dumps(job.header(view)))
    if view == "shuffled":  # by another rule of choosing they would be other images
        header["header"]["shown"] = fingerprint([viewer.key(i) for i in wanted])
    if num_same := viewer.num_of_own_group(wanted):
        # Not in other headers: predictions from before are read.
        header["header"]["shown_of_own_group"] = num_same
    keys = {i: f"{viewer.key(i)} {question}" for i, question in asked.items()}
    answers = _finished(path, header, {records[i].id: key for i, key in keys.items()})
    if answers is None:
        answers = _ask(job, path, viewer, header, keys)
    rows = [row_of(records[i], answers[key], asked[i]) for i, key in keys.items()]
    write_jsonl(path, [header, *rows])
    path.with_suffix(".part").unlink(missing_ok=True)
    return rows


def _ask(
    job: PredictionJob, path: Path, viewer: Viewer, header: Row, keys: Mapping[int, str]
) -> dict[str, str]:
    """Ask what is not in the unfinished file yet; return all answers by key."""
    part = path.with_suffix(".part")
    answers = _answered(part, header)
    waiting = {key: i for i, key in reversed(list(keys.items())) if key not in answers}
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        growing(path),
        part.open("a", encoding="utf-8") as out,
        progress(f"predict {viewer.view}", len(waiting)) as advance,
    ):
        if not answers:
            out.truncate(0)
            out.write(json.dumps(header) + "\n")
        for index, text in _stripped(job.respondent.answers(viewer, list(waiting.values()))):
            answers[keys[index]] = text
            out.write(json.dumps([keys[index], text]) + "\n")
            out.flush()
            advance(1)
    return answers


def _stripped(found: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    for index, text in found:
        yield index, text.strip()


def _finished(path: Path, header: Row, keys: Mapping[str, str]) -> dict[str, str] | None:
    """Return the answers of a finished file with the same header that holds them all, by key."""
    if not path.exists():
        return None
    answers: dict[str, str] = {}
    with path.open(encoding="utf-8") as lines:
        try:
            if json.loads(next(lines, "")) != header:
                return None
            for line in lines:
                row = json.loads(line)
                if str(row["id"]) in keys:
                    answers[keys[str(row["id"])]] = str(row["prediction"])
        except (ValueError, KeyError):
            return None  # edited or damaged: asked again
    return answers if answers.keys() == set(keys.values()) else None


def _answered(path: Path, header: Row) -> dict[str, str]:
    """Return the answers of an unfinished file with the same header, a torn last line left out."""
    found = whole_lines(path, _header_or_answer)
    if not found or found[0] != json.loads(json.dumps(header)):
        return {}
    return dict(found[1:])


def _header_or_answer(line: bytes) -> Any:
    """Return a header, or a key and its answer; anything else is a ValueError."""
    row = json.loads(line)
    if isinstance(row, dict) and "header" in row:
        return row
    key, answer = row
    return key, answer
