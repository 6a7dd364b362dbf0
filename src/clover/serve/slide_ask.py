"""`clover ask` on slides: one region, or a tour over all tissue.

What the file and the model folder say is checked before the model is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from clover.core.assets import expanded
from clover.core.errors import CloverError

if TYPE_CHECKING:
    from PIL import Image

    from clover.language.protocol import GenerationSettings
    from clover.model import Clover
    from clover.slides.reader import Slide
    from clover.slides.region import Region

Command = TypeVar("Command", bound=Callable[..., Any])
_TOLERANCE = 1.25
"""Seen coarser or finer than learnt by more than this is said."""


mpp_option = click.option(
    "--mpp",
    metavar="UM",
    help="µm per pixel, for a file that does not state it; 'estimate' takes the objective's usual "
    "one.",
)


def slide_options(command: Command) -> Command:
    """Add what `ask` takes about slides."""
    for option in (
        click.option(
            "--fields",
            type=click.IntRange(1),
            default=100,
            show_default=True,
            help="--tour: fields asked at most, evenly spread over the tissue.",
        ),
        click.option(
            "--out",
            type=click.Path(path_type=Path, file_okay=False),
            help="--tour: folder of answers and heat map; SLIDE-tour/QUESTION by default.",
        ),
        click.option("--tour", metavar="QUESTION", help="Ask this of all tissue, field by field."),
        click.option("--region", metavar="X,Y,W,H", help="Ask about this rectangle, in µm."),
        mpp_option,
    ):
        command = option(command)
    return command


@dataclass(frozen=True)
class View:
    """What the model is shown.

    Attributes:
        picture: At the model's µm per pixel.
        region: On the slide.
        learnt: The model's µm per pixel.
        side: Pixels a side of the model's input.
    """

    picture: Image.Image
    region: Region
    learnt: float
    side: int

    @property
    def seen(self) -> float:
        """The µm per pixel the model sees the region at, once it fills its input."""
        return max(self.region.width, self.region.height) / self.side

    def note(self) -> str | None:
        """Return what is to be said where the model sees another scale than it learnt."""
        if 1 / _TOLERANCE <= self.seen / self.learnt <= _TOLERANCE:
            return None
        return (
            f"Note: the region is seen at {self.seen:.2g} µm/px, the model learnt at "
            f"{self.learnt:g}; its own field is {self.learnt * self.side:.0f} µm wide."
        )

    def row(self) -> dict[str, Any]:
        """Return the JSON-able form."""
        return {"region": str(self.region), "microns_per_pixel": round(self.seen, 4)}


def open_for(image: Path, mpp: str | None) -> Slide:
    """Open a slide with the size of a pixel that the user stated.

    Raises:
        CloverError: no slide, or a size that is none.
    """
    from clover.slides.reader import open_slide
    from clover.slides.units import parse_microns_per_pixel

    if mpp == "estimate":
        return open_slide(image, estimate=True)
    return open_slide(image, parse_microns_per_pixel(mpp) if mpp else None)


def look_at_region(
    config: dict[str, Any], image: Path, region: str | None, mpp: str | None
) -> View | None:
    """Read the region that a command names; None where it names a plain image.

    Args:
        config: The model folder's.
        image: A slide, an image, or ``slide.svs#x,y,width,height``.
        region: The value of --region.
        mpp: The value of --mpp; with a plain image alone the whole of it is the region.

    Raises:
        CloverError: everything that is wrong with them.
    """
    from clover.slides.picture import check_is_no_slide
    from clover.slides.region import parse_region, split_reference

    path, named = split_reference(image)
    if region is not None and named is not None:
        raise CloverError(f"{image} names a region and --region another; give one of them")
    place = parse_region(region) if region is not None else named
    if place is None and mpp is None:
        return None
    if place is None:
        check_is_no_slide(path)
    learnt, side = stated_resolution(config)
    with open_for(path, mpp) as slide:
        place = place or slide.extent
        return View(slide.read(place, learnt), place, learnt, side)


def check_conversation(config: dict[str, Any], image: str, mpp: str | None) -> None:
    """Look whether a conversation can begin with an image, before gigabytes are loaded.

    Args:
        config: The model folder's.
        image: A field of view, a whole slide, or ``slide.svs#x,y,width,height``.
        mpp: The value of --mpp.

    Raises:
        CloverError: it cannot.
    """
    from clover.model import open_image
    from clover.slides.picture import is_whole_slide
    from clover.slides.region import split_reference

    file, region = split_reference(expanded(image))
    if region is not None:
        look_at_region(config, expanded(image), None, mpp)
    elif is_whole_slide(file):
        stated_resolution(config)
        with open_for(file, mpp) as slide:
            _ = slide.scale  # raises where nobody states it
    else:
        open_image(file)


def stated_resolution(config: dict[str, Any]) -> tuple[float, int]:
    """Return the µm per pixel a model folder's encoder learnt at, and its input's side in pixels.

    Raises:
        CloverError: it does not say; it is never guessed.
    """
    encoder = config["recipe"].get("encoder", {})
    learnt = encoder.get("microns_per_pixel")
    if learnt is None:
        raise CloverError(
            f"{config['name']} does not state the µm per pixel its images were taken at, so no "
            "region can be shown to it; set encoder.microns_per_pixel in its config.json"
        )
    return float(learnt), int(encoder.get("image_size", 224))


def ask_tour(
    load_model: Callable[[], tuple[Clover, GenerationSettings]],
    image: Path,
    question: str,
    options: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    """Run a tour and print it.

    Raises:
        CloverError: see `run_tour`.
    """
    from clover.model import NOTICE
    from clover.serve.tour import run_tour
    from clover.slides.field import tissue_fields
    from clover.slides.region import parse_region

    within = parse_region(options["region"]) if options["region"] else None
    with open_for(image, options["mpp"]) as slide:
        # An empty slide, or one without µm per pixel, is told before the model is loaded.
        tissue_fields(slide, side_um=options["field_um"], within=within)
        model, settings = load_model()
        out = options["out"] or Path(f"{image.stem}-tour") / _as_name(question)
        tour = run_tour(
            model,
            slide,
            question,
            settings=settings,
            out=out,
            within=within,
            most=options["fields"],
        )
    if as_json:
        click.echo(json.dumps(tour.row(), ensure_ascii=False))
        return
    sample = "all" if len(tour.fields) == tour.num_tissue else f"{len(tour.fields):,} of"
    click.echo(f"{question}  {sample} {tour.num_tissue:,} tissue fields of {tour.side_um:.0f} µm")
    for answer, count in tour.counts():
        click.echo(f"  {count:>6,}  {count / len(tour.fields):>4.0%}  {answer}")
    click.echo(f"agreement {tour.agreement:.2f}; {out}/heat-map.png")
    click.secho(NOTICE, dim=True, err=True)


def _as_name(question: str) -> str:
    """Return a question as a folder's name: two tours of one slide lie beside each other."""
    words = re.sub(r"[^a-z0-9]+", "-", question.lower()).strip("-")
    return words[:60] or "tour"
