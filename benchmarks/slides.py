"""How quickly are slides read? Tiles, regions and the tissue mask, against OpenSlide alone.

    python -m benchmarks.slides SLIDE.svs

One JSON line a figure. The peer reads the same pixels of the finest level with OpenSlide and scales
them with Pillow; both sides alternate in one run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import openslide
from PIL import Image

from clover.slides.deepzoom import TILE, num_levels, tile
from clover.slides.field import tissue_fields
from clover.slides.reader import open_slide
from clover.slides.tissue import find_tissue

_MPP, _SIDE = 0.8, 224


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("slide", type=Path)
    path = parser.parse_args().slide
    slide = open_slide(path)
    start = time.perf_counter()
    tissue = find_tissue(slide)
    seconds = time.perf_counter() - start
    show("tissue mask, s", seconds, 1)
    fields = tissue_fields(slide, side_um=_MPP * _SIDE, tissue=tissue)
    ours, theirs = [], []
    peer = openslide.OpenSlide(path)
    scale = float(peer.properties["openslide.mpp-x"])
    for region in fields:
        ours.append(timed(lambda place=region: slide.read(place, _MPP))[1])
        corner = (round(region.x / scale), round(region.y / scale))
        side = round(region.width / scale)

        def alone(corner: tuple[int, int] = corner, side: int = side) -> Image.Image:
            found = peer.read_region(corner, 0, (side, side)).convert("RGB")
            return found.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)

        theirs.append(timed(alone)[1])
    value, against = statistics.median(ours) * 1e3, statistics.median(theirs) * 1e3
    show("field of view, median ms", value, len(ours), openslide_alone=against)
    levels = num_levels(slide)
    spent = []
    for level in range(levels):
        shrunk = 2 ** (levels - 1 - level)
        across, down = (math.ceil(math.ceil(side / shrunk) / TILE) for side in slide.size)
        for column in range(across):
            for row in range(down):
                spent.append(timed(lambda p=(level, column, row): tile(slide, *p))[1])
    spent.sort()
    show("tile, median ms", statistics.median(spent) * 1e3, len(spent), worst=spent[-1] * 1e3)


def timed(work: Callable[[], object]) -> tuple[object, float]:
    """Return what a function gives, and its seconds."""
    start = time.perf_counter()
    found = work()
    return found, time.perf_counter() - start


def show(figure: str, value: float, count: int, **more: float) -> None:
    """Print one figure."""
    row = {"figure": figure, "value": round(value, 2), "of": count}
    print(json.dumps(row | {name: round(item, 2) for name, item in more.items()}), flush=True)


if __name__ == "__main__":
    main()
