"""What the demo ends with: the evaluation's table, the bill, and the command to go on with."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from clover.evaluate.summary import evaluation_lines


def demo_table(scores: dict[str, Any], out: Path) -> list[str]:
    """Return the lines the demo ends with."""
    image = out / "phantom-validation" / "images" / "00000.png"
    return [
        "",
        *evaluation_lines(scores),
        f"{scores['seconds']:.0f} seconds and ${scores['dollars']:.2f} in all; "
        f"the page: {out / 'report.html'}",
        "Research use only, not for diagnosis.",
        "",
        "Talk to it:",
        "  " + shlex.join(["clover", "chat", str(out / "model"), str(image)]),
    ]
