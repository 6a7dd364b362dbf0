"""Predictions: the model's answers in a file that anybody can score again without a GPU.

The first line is a header (model, decoding, data, view); a prediction's line repeats the question
and the gold answer. The file grows while it is made; the same call continues it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clover.core.files import fingerprint, growing, write_jsonl
from clover.core.record import Record
from clover.core.terminal import progress
from clover.evaluate.view import View, Viewer
from clover.language.protocol import GenerationSettings
from clover.model import Clover
from clover.vision.dataset import FeatureSet

Row = dict[str, Any]


@dataclass(frozen=True)
class PredictionJob:
    """What is asked, and how."""

    model: Clover
    data: FeatureSet
    settings: GenerationSettings
    batch_size: int
    model_key: str
    seed: int = 0

    def header(self, view: View) -> Row:
        """Return the header line of a predictions file."""
        ids = [record.id for record in self.data.records]
        return {
            "header": {
                "model": self.model.name,
                "model_key": self.model_key,
                "view": view,
                "prompt": self.model.recipe.prompt.template,
                "decoding": asdict(self.settings),
                "data": fingerprint([ids, self.data.digests]),
                "seed": self.seed,
                "notice": "research use only, not for diagnosis",
            }
        }


def row_of(record: Record, prediction: str) -> Row:
    """Return a prediction's line."""
    row = record.row()
    kept = ("id", "image", "group", "question", "answer", "answer_type", "form", "yes_no_answer")
    return {key: row[key] for key in kept if key in row} | {"prediction": prediction}


def predict(
    job: PredictionJob, path: Path, *, view: View = "image", indices: Sequence[int] | None = None
) -> list[Row]:
    """Answer every question, or those at `indices`, and write `path`.

    Equal questions about equal images are asked once: in the blind view that is once a question.

    Returns:
        The predictions' lines, in the data's order.
    """
    chosen = list(range(len(job.data.records))) if indices is None else list(indices)
    viewer = Viewer(job.data, job.model.encoder, view=view, seed=job.seed)
    header = job.header(view)
    answers = _answered(path.with_suffix(".part"), header)
    keys = {i: _key(viewer, job, i) for i in chosen}
    waiting = {key: i for i, key in reversed(keys.items()) if key not in answers}
    # Questions of like length together: the shorter ones are padded least.
    order = sorted(waiting.values(), key=lambda i: (len(job.data.records[i].question or ""), i))
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        growing(path),
        path.with_suffix(".part").open("a", encoding="utf-8") as out,
        progress(f"predict {view}", len(order)) as advance,
    ):
        if not answers:
            out.truncate(0)
            out.write(json.dumps(header) + "\n")
        for start in range(0, len(order), job.batch_size):
            part = order[start : start + job.batch_size]
            questions = [job.model.question_of(job.data.records[i]) for i in part]
            texts = job.model.answer_features(viewer.features(part), questions, job.settings)
            for index, text in zip(part, texts, strict=True):
                answers[keys[index]] = text.strip()
                out.write(json.dumps([keys[index], text.strip()]) + "\n")
            out.flush()
            advance(len(part))
    rows = [row_of(job.data.records[i], answers[keys[i]]) for i in chosen]
    write_jsonl(path, [header, *rows])
    path.with_suffix(".part").unlink(missing_ok=True)
    return rows


def _key(viewer: Viewer, job: PredictionJob, index: int) -> str:
    return f"{viewer.key(index)} {job.data.records[index].question}"


def _answered(path: Path, header: Row) -> dict[str, str]:
    """Return the answers of an unfinished file with the same header, a torn last line left out."""
    if not path.exists():
        return {}
    lines = path.read_bytes().splitlines(keepends=True)
    try:
        if not lines or json.loads(lines[0]) != json.loads(json.dumps(header)):
            return {}
    except ValueError:
        return {}
    answers: dict[str, str] = {}
    whole = len(lines[0])
    for line in lines[1:]:
        try:
            key, answer = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        answers[key] = answer
        whole += len(line)
    # Cut a torn line off in place, so that what is appended starts on a line of its own. The file
    # is not written anew: a full disk would take what was answered already.
    os.truncate(path, whole)
    return answers
