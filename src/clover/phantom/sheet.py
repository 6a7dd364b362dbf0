"""A labelled contact sheet: what the phantom can show, on one picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from clover.core.files import atomic_path
from clover.phantom.case import SIZE, STAINS, TISSUES, Case, Region, sample_case
from clover.phantom.picture import render

_PLAIN: dict[str, Any] = {
    "cellularity": "moderate",
    "atypia": False,
    "mitoses": False,
    "infiltrate": "none",
    "necrosis": False,
    "fibrosis": False,
    "regions": (),
}
_MIDDLE = {"x": 112.0, "y": 112.0, "radius_x": 46.0, "radius_y": 42.0}
# Label, and what differs from a plain field; each row has one tissue's finding in two stains.
_FINDINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("low cellularity", {"cellularity": "low"}),
    ("high cellularity", {"cellularity": "high"}),
    ("atypia", {"atypia": True}),
    ("mitoses", {"mitoses": True}),
    (
        "lymphoid infiltrate",
        {"infiltrate": "lymphoid", "regions": (Region("infiltrate", **_MIDDLE),)},
    ),
    (
        "neutrophilic infiltrate",
        {"infiltrate": "neutrophilic", "regions": (Region("infiltrate", **_MIDDLE),)},
    ),
    ("necrosis", {"necrosis": True, "regions": (Region("necrosis", **_MIDDLE),)}),
    ("fibrosis", {"fibrosis": True}),
)
_LABEL_HEIGHT = 18
_GAP = 4


def _cells(seed: int) -> list[list[tuple[str, Case]]]:
    """Return rows of (label, case): tissues by stains, then findings by stains."""
    rows: list[list[tuple[str, Case]]] = []
    for stain in STAINS:
        rows.append(
            [
                (f"{tissue}, {stain}", _case(seed, number, tissue=tissue, stain=stain))
                for number, tissue in enumerate(TISSUES)
            ]
        )
    tissues = ("kidney", "lung", "liver", "colon", "smooth muscle", "liver", "kidney", "colon")
    for stain in STAINS:
        rows.append(
            [
                (f"{label}, {tissue}", _case(seed, 20 + i, tissue=tissue, stain=stain, **changes))
                for i, ((label, changes), tissue) in enumerate(zip(_FINDINGS, tissues, strict=True))
            ]
        )
    return rows


def _case(seed: int, number: int, **changes: Any) -> Case:
    return replace(sample_case(seed, "sheet", number), **(_PLAIN | changes))


def contact_sheet(seed: int = 0, *, scale: float = 0.56) -> Image.Image:
    """Draw tissues by stains, then findings by stains, each with its label."""
    rows = _cells(seed)
    side = round(SIZE * scale)
    width = len(rows[0]) * (side + _GAP) + _GAP
    height = len(rows) * (side + _LABEL_HEIGHT + _GAP) + _GAP
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=10)
    for row, cells in enumerate(rows):
        for column, (label, case) in enumerate(cells):
            left = _GAP + column * (side + _GAP)
            top = _GAP + row * (side + _LABEL_HEIGHT + _GAP)
            label = label.replace("immunohistochemistry", "IHC").replace("h&e", "H&E")
            label = label.replace("pas", "PAS").replace("infiltrate, ", "inf., ")
            pen.text((left, top + 3), label, fill="black", font=font)
            tile = Image.fromarray(render(case)).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(tile, (left, top + _LABEL_HEIGHT))
    return sheet


def write_sheet(path: Path, *, seed: int = 0) -> None:
    """Write the contact sheet as a PNG of 128 colours: a third of the size, and looks the same."""
    sheet = contact_sheet(seed).quantize(128, dither=Image.Dither.NONE)
    with atomic_path(path) as partial:
        sheet.save(partial, format="PNG", optimize=True)
