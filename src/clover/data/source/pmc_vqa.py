"""PMC-VQA: one question a row with four choices; both published layouts.

The first layout writes the answer out and its letter beside it, the second only the letter. The
record's answer is the choice's text; the choices are kept. Open unless that text is yes or no.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from clover.data.lines import Line, split_name
from clover.data.source.base import Options, clean, image_name, is_yes_or_no

_LETTERS = "ABCD"
_MARK = re.compile(r"^\s*[A-D]\s*[:.)]\s*")


def read(lines: Iterator[Line], options: Options) -> Iterator[Line]:
    """Yield one line a question, in our columns."""
    for line in lines:
        if not isinstance(line.row, dict):
            yield line
            continue
        choices = [_MARK.sub("", clean(line.row.get(f"Choice {name}"))) for name in _LETTERS]
        answer = clean(line.row.get("Answer"))
        if answer in _LETTERS and answer and any(choices):
            answer = choices[_LETTERS.index(answer)]
        answer = _MARK.sub("", answer)
        row: dict[str, Any] = {"question": clean(line.row.get("Question")), "answer": answer}
        row["answer_type"] = "closed" if is_yes_or_no(answer) else "open"
        row["choices"] = [choice for choice in choices if choice] or None
        row["image"] = image_name(line.row) or None
        row["caption"] = line.row.get("Caption")
        row["source"] = "pmc-vqa"
        row["split"] = split_name(clean(line.row.get("split"))) or line.split
        row["id"] = f"pmc-vqa-{line.path.name.split('.')[0]}-{line.number}"
        yield line._replace(row=row)
