"""The sources by name, and which of them a file is, told from its first row."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from clover.core.errors import CloverError, nearest
from clover.data.lines import Line
from clover.data.source import llava_med, pathvqa, plain, pmc_vqa, quilt1m, quilt_vqa
from clover.data.source.base import Options, image_name

Reader = Callable[[Iterator[Line], Options], Iterator[Line]]

READERS: dict[str, Reader] = {
    "pathvqa": pathvqa.read,
    "quilt-vqa": quilt_vqa.read,
    "llava-med": llava_med.read,
    "pmc-vqa": pmc_vqa.read,
    "quilt1m": quilt1m.read,
    "records": plain.read,
}
AUTO = "auto"

# What only a path can tell, when the columns are everybody's.
_IN_PATH = {
    "pathvqa": re.compile(r"path-?_?vqa|pvqa"),
    "quilt-vqa": re.compile(r"quilt-?_?(vqa|gpt)"),
    "pmc-vqa": re.compile(r"pmc-?_?vqa"),
}


def check_name(name: str) -> None:
    """Refuse an unknown source.

    Raises:
        CloverError: with the nearest known name.
    """
    if name not in (*READERS, AUTO):
        raise CloverError(f"no source '{name}'{nearest(name, (*READERS, AUTO))}")


def recognise(line: Line) -> str:
    """Return the name of the source whose form a row has; ``records`` if no other's."""
    row = line.row
    if not isinstance(row, dict):
        return "records"
    columns = set(row)
    if columns & {"sentf", "labelf"} or {"sent", "label"} <= columns:
        return "pathvqa"
    if _is_pathvqa_image(row):
        return "pathvqa"
    if columns & {"conversations", "conversatons", "gpt4_answer"}:
        return "llava-med"
    if columns & {"Figure_path", "Choice A"}:
        return "pmc-vqa"
    if {"caption", "image_path", "pathology"} <= columns:
        return "quilt1m"
    if "yes_no_answer" in columns and "prediction" not in columns:
        return "quilt-vqa"
    is_question = bool(columns & {"question", "Question", "text"}) and "caption" not in columns
    for name, pattern in _IN_PATH.items():
        if is_question and pattern.search(f"{line.path.parent.name}/{line.path.name}".lower()):
            return name
    return "records"


def _is_pathvqa_image(row: Mapping[str, Any]) -> bool:
    has_question = bool({"question", "conversations", "conversatons"} & set(row))
    # Our own records name the same images; they have a source and are read as they are.
    return has_question and "source" not in row and pathvqa.is_image_name(image_name(row))
