"""What is true of one synthetic image, drawn from its seed before a pixel is painted."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Tissue = Literal[
    "colon",
    "squamous epithelium",
    "lymph node",
    "adipose tissue",
    "liver",
    "smooth muscle",
    "kidney",
    "lung",
]
Stain = Literal["h&e", "immunohistochemistry", "pas"]
Cellularity = Literal["low", "moderate", "high"]
Infiltrate = Literal["none", "lymphoid", "neutrophilic"]

TISSUES: tuple[Tissue, ...] = (
    "colon",
    "squamous epithelium",
    "lymph node",
    "adipose tissue",
    "liver",
    "smooth muscle",
    "kidney",
    "lung",
)
STAINS: tuple[Stain, ...] = ("h&e", "immunohistochemistry", "pas")
CELLULARITIES: tuple[Cellularity, ...] = ("low", "moderate", "high")
INFILTRATES: tuple[Infiltrate, ...] = ("none", "lymphoid", "neutrophilic")

SIZE = 224
"""Side of an image, in pixels."""
MICRONS_PER_PIXEL = 0.8
"""A nucleus of 8 um is 10 px wide; a field is 179 um, so a crypt or a small glomerulus fits."""

# One generator a purpose, so that a new caption clause never changes a picture.
Purpose = Literal["truth", "picture", "caption", "question"]
_PURPOSES: tuple[Purpose, ...] = ("truth", "picture", "caption", "question")


@dataclass(frozen=True)
class Region:
    """Where a finding lies: an ellipse, in pixels from the upper left corner."""

    finding: str
    x: float
    y: float
    radius_x: float
    radius_y: float

    def row(self) -> dict[str, Any]:
        """Return the JSON-able form."""
        return {
            "finding": self.finding,
            "x": round(self.x, 1),
            "y": round(self.y, 1),
            "radius_x": round(self.radius_x, 1),
            "radius_y": round(self.radius_y, 1),
        }


@dataclass(frozen=True)
class Case:
    """The truth of one image. The same seed, split and index give the same case for ever."""

    seed: int
    split: str
    index: int
    tissue: Tissue
    stain: Stain
    cellularity: Cellularity
    atypia: bool
    mitoses: bool
    infiltrate: Infiltrate
    necrosis: bool
    fibrosis: bool
    regions: tuple[Region, ...]
    """Where necrosis and infiltrate lie. Mitoses are placed on cells, see `picture.Picture`."""

    @property
    def name(self) -> str:
        """The image's id: five digits or more."""
        return f"{self.index:05d}"

    def generator(self, purpose: Purpose) -> np.random.Generator:
        """Return the random generator of one purpose."""
        return generator(self.seed, self.split, self.index, purpose)

    def region(self, finding: str) -> Region | None:
        """Return the place of a finding, or None."""
        return next((item for item in self.regions if item.finding == finding), None)

    def truth(self, regions: tuple[Region, ...]) -> dict[str, Any]:
        """Return the truth as it is written into a record; `regions` are those of the picture."""
        return {
            "tissue": self.tissue,
            "stain": self.stain,
            "cellularity": self.cellularity,
            "atypia": self.atypia,
            "mitoses": self.mitoses,
            "infiltrate": self.infiltrate,
            "necrosis": self.necrosis,
            "fibrosis": self.fibrosis,
            "regions": [item.row() for item in regions],
        }


def generator(seed: int, split: str, index: int, purpose: Purpose) -> np.random.Generator:
    """Return the generator of (seed, split, index, purpose).

    The split's name is part of the entropy and the index of the spawn key, so two splits, or two
    images, can never share a stream whatever seeds they are given.
    """
    split_key = int.from_bytes(hashlib.sha256(split.encode()).digest()[:16], "little")
    spawn_key = (index, _PURPOSES.index(purpose))
    return np.random.default_rng(np.random.SeedSequence([seed, split_key], spawn_key=spawn_key))


def sample_case(seed: int, split: str, index: int) -> Case:
    """Draw the truth of one image. Findings are independent of tissue and of each other.

    One exception, because it would not be visible: a lymph node has no lymphoid infiltrate.
    """
    rng = generator(seed, split, index, "truth")
    tissue = TISSUES[rng.integers(len(TISSUES))]
    stain = STAINS[rng.integers(len(STAINS))]
    cellularity = CELLULARITIES[rng.integers(len(CELLULARITIES))]
    atypia, mitoses, necrosis, fibrosis = (bool(value) for value in rng.random(4) < 0.5)
    infiltrate = INFILTRATES[rng.choice(3, p=[0.4, 0.3, 0.3])]
    if infiltrate == "lymphoid" and tissue == "lymph node":
        infiltrate = "neutrophilic"
    regions: list[Region] = []
    if necrosis:
        regions.append(_place(rng, "necrosis", (44.0, 54.0), regions))
    if infiltrate != "none":
        regions.append(_place(rng, "infiltrate", (38.0, 48.0), regions))
    return Case(
        seed=seed,
        split=split,
        index=index,
        tissue=tissue,
        stain=stain,
        cellularity=cellularity,
        atypia=atypia,
        mitoses=mitoses,
        infiltrate=infiltrate,
        necrosis=necrosis,
        fibrosis=fibrosis,
        regions=tuple(regions),
    )


def _place(
    rng: np.random.Generator, finding: str, radii: tuple[float, float], taken: list[Region]
) -> Region:
    """Draw a place inside the field, as far from the places taken as 40 trials allow."""
    radius_x, radius_y = rng.uniform(*radii, size=2)
    best, best_gap = Region(finding, SIZE / 2, SIZE / 2, radius_x, radius_y), -np.inf
    for _ in range(40):
        x = rng.uniform(radius_x * 0.9, SIZE - radius_x * 0.9)
        y = rng.uniform(radius_y * 0.9, SIZE - radius_y * 0.9)
        gap = min(
            (
                float(np.hypot(x - other.x, y - other.y))
                - max(other.radius_x, other.radius_y)
                - max(radius_x, radius_y)
                for other in taken
            ),
            default=0.0,
        )
        if gap > best_gap:
            best, best_gap = Region(finding, x, y, radius_x, radius_y), gap
        if gap >= 0:
            break
    return best
