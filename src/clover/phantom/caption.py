"""Captions as people write them: the same truth in many orders, words and lengths."""

from __future__ import annotations

import re

import numpy as np

from clover.phantom.case import SIZE, Case
from clover.phantom.wording import capitalised, language, listed, pick


def write_caption(case: Case) -> str:
    """Write one caption: tissue, stain and findings early, then elaboration, 6 to 60 words."""
    rng = case.generator("caption")
    words = language()["captions"]
    present, absent = _findings(case, rng)
    sentences = [_opening(case, rng, present)]
    if absent and rng.random() < 0.55:
        share = rng.permutation(absent)[: rng.integers(1, len(absent) + 1)].tolist()
        sentences.append(pick(rng, words["absent"]).format(absent=listed(share, "or")))
    features = language()["tissues"][case.tissue]["features"]
    extras = [pick(rng, words["features"]).format(feature=pick(rng, features))]
    extras += [text for key in _keys_present(case) if (text := _more(case, rng, key))]
    extras.append(pick(rng, words["remarks"]))
    # Most captions stop early, some run on: the long tail of what people write.
    num = min(int(rng.geometric(0.52)) - 1, len(extras))
    sentences += [extras[index] for index in rng.permutation(len(extras))[:num]]
    return " ".join(_sentence(text) for text in sentences)


def _keys_present(case: Case) -> list[str]:
    keys = [key for key in ("necrosis", "atypia", "mitoses", "fibrosis") if getattr(case, key)]
    return [*keys, case.infiltrate] if case.infiltrate != "none" else keys


def _findings(case: Case, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Return phrases for what is present and nouns for what is absent, each in random order."""
    known = language()["findings"]
    present = [pick(rng, known[key]["present"]) for key in _keys_present(case)]
    missing = [
        key for key in ("necrosis", "atypia", "mitoses", "fibrosis") if not getattr(case, key)
    ]
    if case.infiltrate == "none":
        missing.append("none")
    absent = [pick(rng, known[key]["absent"]) for key in missing]
    return [present[i] for i in rng.permutation(len(present))], absent


def _opening(case: Case, rng: np.random.Generator, present: list[str]) -> str:
    vocabulary = language()
    words = vocabulary["captions"]
    stain = vocabulary["stains"][case.stain]
    form = pick(rng, words["with_findings" if present else "without_findings"])
    cells = pick(rng, vocabulary["cellularity"][case.cellularity])
    return form.format(
        tissue=pick(rng, vocabulary["tissues"][case.tissue]["names"]),
        stain=pick(rng, stain["nouns"]),
        adjective=pick(rng, stain["adjectives"]),
        cells=cells,
        Cells=capitalised(cells),
        found=listed(present, "and"),
        none=pick(rng, words["nothing"]),
    )


def _more(case: Case, rng: np.random.Generator, key: str) -> str:
    place = ""
    finding = "infiltrate" if key in ("lymphoid", "neutrophilic") else key
    if (region := case.region(finding)) is not None:
        rows = language()["captions"]["places"]
        row, column = (min(int(value / SIZE * 3), 2) for value in (region.y, region.x))
        place = " " + rows[row][column]
    return pick(rng, language()["findings"][key]["more"]).format(place=place)


def _sentence(text: str) -> str:
    """Return a sentence with capitals after full stops."""
    text = re.sub(r"(?<=[.] )[a-z]", lambda match: match.group().upper(), text)
    return capitalised(text)
