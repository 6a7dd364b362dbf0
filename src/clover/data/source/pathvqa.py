"""PathVQA in each of its forms, as the same records.

Forms: the original pickles (`image, question, answer`), LXMERT's (`img_id, sent, label`, or one row
an image with `sentf, labelf`), the hub's Parquet, LLaVA-Med's conversations, and flat tables.
A question is closed if its answer is yes or no. Its id is the image's and its place among that
image's questions, which every form shares.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from clover.data.lines import Line, split_name
from clover.data.source.base import Options, clean, image_name, is_yes_or_no, stem
from clover.data.source.llava_med import turns

_IMAGE = re.compile(r"^(train|val|test)_\d{4}$")


def is_image_name(name: str) -> bool:
    """Return whether an image is called as PathVQA's are: ``test_0001``, with or without ending."""
    return bool(_IMAGE.match(stem(name)))


def read(lines: Iterator[Line], options: Options) -> Iterator[Line]:
    """Yield one line a question, in our columns."""
    asked: Counter[str] = Counter()
    for line in lines:
        if not isinstance(line.row, dict):
            yield line
            continue
        name = image_name(line.row)
        group = stem(name)
        split = split_name(clean(line.row.get("split"))) or _stated(group) or line.split
        for question, answer in _pairs(line.row):
            row: dict[str, Any] = {"question": clean(question), "answer": clean(answer)}
            row["answer_type"] = "closed" if is_yes_or_no(row["answer"]) else "open"
            row |= {"image": _image(line.row, name), "source": "pathvqa", "split": split}
            if name:
                asked[group] += 1
                row |= {"id": f"{group}-{asked[group]}", "group": group}
            yield line._replace(row=row)


def _stated(name: str) -> str | None:
    found = _IMAGE.match(name)
    return found[1] if found else None


def _image(row: Mapping[str, Any], name: str) -> Any:
    """Return the picture itself where the row holds it, else its file name."""
    if isinstance(row.get("image"), Mapping):
        return row["image"]
    if not name:
        return None
    file = name.replace("\\", "/").rsplit("/", 1)[-1]
    return f"{file}.jpg" if file == stem(name) else file


def _pairs(row: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    if "sentf" in row or "labelf" in row:
        # Keyed by the name of the set: {"pvqa": [...]}.
        questions = _flat(row.get("sentf"))
        answers = _flat(row.get("labelf"))
        answers += [None] * (len(questions) - len(answers))
        return [(said, _first(label)) for said, label in zip(questions, answers, strict=False)]
    if "conversations" in row or "conversatons" in row:
        return list(turns(row))
    if "sent" in row:
        return [(row["sent"], _first(row.get("label")))]
    return [(row.get("question"), row.get("answer"))]


def _flat(value: Any) -> list[Any]:
    lists = value.values() if isinstance(value, Mapping) else [value]
    return [item for found in lists if isinstance(found, list) for item in found]


def _first(label: Any) -> Any:
    """Return LXMERT's answer: the first key of ``{answer: 1.0}``."""
    return next(iter(label), None) if isinstance(label, Mapping) else label
