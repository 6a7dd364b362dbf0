"""Examples with pictures: right and wrong answers of many question forms, the blind one beside."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from clover.core.errors import CloverError
from clover.core.transparency import on_white
from clover.report.reading import Row, Run
from clover.slides.picture import is_region, read_region
from clover.slides.region import split_reference

_EACH = 8
"""Right examples, and as many wrong ones."""
_SIDE = 224
_MOST_BYTES = 20_000
_LONGEST_SHOWN = 400


@dataclass(frozen=True)
class Judgement:
    """How much of the truth an answer says."""

    share: float
    text: str

    @property
    def kind(self) -> str:
        """`right`, `part` or `wrong`."""
        return "right" if self.share >= 1 else "part" if self.share > 0 else "wrong"


def judge(row: Row) -> Judgement:
    """Judge an answer for showing it: yes or no as the first such word, else the truth's words.

    The scores come from the evaluation; this only sorts examples.
    """
    said, truth = _words(row.get("prediction")), _words(row.get("answer"))
    if row.get("answer_type") == "closed":
        first = next((word for word in said if word in ("yes", "no")), None)
        is_right = bool(truth) and first == truth[0]
        return Judgement(float(is_right), "right" if is_right else "wrong")
    common = sum((Counter(said) & Counter(truth)).values())
    share = common / len(truth) if truth else 0.0
    if 0 < share < 1:
        return Judgement(share, f"{common} of {len(truth)} words")
    return Judgement(share, "right" if share else "wrong")


def _words(text: Any) -> list[str]:
    return re.findall(r"\w+", text.lower()) if isinstance(text, str) else []


def examples(run: Run) -> dict[str, Any]:
    """Return right and wrong examples with pictures, and how many there were to choose from."""
    rows = run.predictions.get("image", [])
    blind = {row.get("id"): row.get("prediction") for row in run.predictions.get("blind", [])}
    judged = [(row, judge(row)) for row in rows]
    groups = {
        "right": [pair for pair in judged if pair[1].kind == "right"],
        "wrong": [pair for pair in judged if pair[1].kind != "right"],
    }
    folder = image_folder(run)
    used: Counter[str] = Counter()
    shown = {
        name: [_card(row, judgement, blind, folder) for row, judgement in _choose(pairs, used)]
        for name, pairs in groups.items()
    }
    cards = shown["right"] + shown["wrong"]
    return {
        **shown,
        "counts": {name: len(pairs) for name, pairs in groups.items()},
        "missing_pictures": sum(card["picture"] is None for card in cards),
    }


def _choose(
    pairs: Sequence[tuple[Row, Judgement]], used: Counter[str]
) -> list[tuple[Row, Judgement]]:
    """Take one of each form in turn, and of each form the image that was shown least."""
    forms: dict[tuple[str, str], list[tuple[Row, Judgement]]] = defaultdict(list)
    for row, judgement in pairs:
        key = (str(row.get("form") or row.get("question")), str(row.get("answer_type")))
        forms[key].append((row, judgement))
    chosen: list[tuple[Row, Judgement]] = []
    while len(chosen) < _EACH and any(forms.values()):
        for found in forms.values():
            if found and len(chosen) < _EACH:
                shown = [used[str(row.get("image"))] for row, _ in found]
                index = shown.index(min(shown))
                pair = found.pop(index)
                used[str(pair[0].get("image"))] += 1
                chosen.append(pair)
    return chosen


def _card(
    row: Row, judgement: Judgement, blind: dict[Any, Any], folder: Path | None
) -> dict[str, Any]:
    return {
        "form": str(row.get("form") or "").replace("_", " "),
        "question": short(row.get("question")),
        "answer": short(row.get("answer")),
        "prediction": short(row.get("prediction")),
        "blind": short(blind[row.get("id")]) if row.get("id") in blind else None,
        "judgement": judgement,
        "picture": embedded(folder / str(row["image"])) if folder and row.get("image") else None,
    }


def short(text: Any) -> str:
    """Return a text as it is shown: of a long one the beginning."""
    said = "" if text is None else str(text)
    return said if len(said) <= _LONGEST_SHOWN else said[: _LONGEST_SHOWN - 1] + "…"


def image_folder(run: Run) -> Path | None:
    """Return the folder that the predictions' image paths start from, if it is still there."""
    rows = run.predictions.get("image", [])
    names = [str(row["image"]) for row in rows if row.get("image")][:1]
    stated = run.details.get("images")
    places = [Path(stated), run.path / stated, run.path.parent / stated] if stated else []
    # A run folder that was moved: its own fresh images first.
    places += [run.path / "phantom-validation", run.path / "phantom", run.path]
    return next(
        (place for place in places if names and split_reference(place / names[0])[0].is_file()),
        None,
    )


def embedded(path: Path) -> str | None:
    """Return a small picture as a data URI of at most 20 kB, or None for what cannot be read."""
    try:
        with read_region(path, None) if is_region(path) else Image.open(path) as opened:
            picture = on_white(opened).convert("RGB")
    except (CloverError, OSError, ValueError, Image.DecompressionBombError):
        return None
    picture.thumbnail((_SIDE, _SIDE))
    for quality in (85, 75, 60, 45, 30):
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=quality, optimize=True)
        if out.tell() <= _MOST_BYTES:
            break
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")
