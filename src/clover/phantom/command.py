"""`clover phantom`: make synthetic histology with known truth."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(
    epilog="Example: clover phantom phantom/train --images 1200 --seed 0. "
    "Research use only, not for diagnosis."
)
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--images", type=int, default=100, show_default=True, help="How many images.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Other seeds, other sets."
)
@click.option(
    "--split",
    default="train",
    show_default=True,
    help="Name of the split; two splits never share an image, whatever their seeds.",
)
@click.option(
    "--both-ways",
    is_flag=True,
    help="Ask whether it is a named tissue or stain twice, once with the right name: for training.",
)
@click.option(
    "--sheet",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write a labelled contact sheet (PNG) of all tissues, stains and findings.",
)
def phantom(
    out: Path, images: int, seed: int, split: str, both_ways: bool, sheet: Path | None
) -> None:
    """Write OUT/images/*.png, OUT/captions.jsonl and OUT/vqa.jsonl (with the truth).

    Synthetic histology, 224 px at 0.8 microns per pixel: eight tissues, three stains, six findings.
    The same numbers give the same bytes; called again, it finishes what is missing.
    """
    from clover.phantom.write import make_phantom

    make_phantom(out, images=images, seed=seed, split=split, both_ways=both_ways)
    click.echo(f"{images:,} images, captions.jsonl and vqa.jsonl in {out}")
    if sheet is not None:
        from clover.phantom.sheet import write_sheet

        write_sheet(sheet, seed=max(seed, 0))
        click.echo(f"contact sheet in {sheet}")
