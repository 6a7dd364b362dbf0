"""A case in, its picture out: tissue, then findings, then nuclei, then colour."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clover.phantom import finding, stain, tissue
from clover.phantom.canvas import Canvas
from clover.phantom.case import Case, Region


@dataclass(frozen=True)
class Picture:
    """A painted case and every place its truth names."""

    image: NDArray[np.uint8]
    """[224, 224, 3], RGB."""
    regions: tuple[Region, ...]
    masks: dict[str, NDArray[np.bool_]]
    """Where necrosis and infiltrate were painted, [224, 224] each; their regions are the ellipses
    that the ragged edges run about."""


def draw(case: Case) -> Picture:
    """Paint a case. The same case gives the same bytes."""
    rng = case.generator("picture")
    canvas = Canvas(case)
    tissue.paint(canvas, rng)
    if case.fibrosis:
        finding.fibrosis(canvas, rng)
    masks: dict[str, NDArray[np.bool_]] = {}
    if (place := case.region("necrosis")) is not None:
        masks["necrosis"] = finding.necrosis(canvas, rng, place) > 0.5
    if (place := case.region("infiltrate")) is not None:
        masks["infiltrate"] = finding.infiltrate(canvas, rng, place) > 0.5
    # Figures are painted after the other nuclei, which must not cover them.
    figures = finding.choose_mitoses(canvas, rng) if case.mitoses else None
    finding.paint_nuclei(canvas, rng)
    regions = list(case.regions)
    if figures is not None:
        regions += finding.paint_mitoses(canvas, rng, figures)
    return Picture(stain.colour(canvas, rng), tuple(regions), masks)


def render(case: Case) -> NDArray[np.uint8]:
    """Return the picture of a case, [224, 224, 3] RGB."""
    return draw(case).image
