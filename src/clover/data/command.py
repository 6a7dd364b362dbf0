"""The verbs of this room: `clover data import` and `clover data check`."""

from __future__ import annotations

from pathlib import Path

import click

_PATH = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def data() -> None:
    """Other people's data sets as records, and records looked over before they cost anything.

    \b
    Example:
      clover data import quilt1m quilt_1M_lookup.csv --images images.zip \\
          --subset pathology --out quilt.jsonl
      clover data check quilt.jsonl --against test.jsonl
    """


@data.command("import")
@click.argument("source", metavar="SOURCE")
@click.argument("path", metavar="SRC", type=_PATH)
@click.option("--out", required=True, type=_PATH, help="The JSON Lines file to write.")
@click.option(
    "--images",
    multiple=True,
    type=_PATH,
    help="A folder or zip file with images; may be given several times. By default SRC's folder.",
)
@click.option(
    "--subset",
    multiple=True,
    metavar="COLUMN[=VALUE]",
    help="Only rows that fill this column, or hold this value; several: all of them.",
)
@click.option("--text-column", metavar="COLUMN", help="The column that becomes the caption.")
@click.option("--truth", type=_PATH, help="quilt-vqa: answers in a file of their own, by id.")
def import_(
    source: str,
    path: Path,
    out: Path,
    images: tuple[Path, ...],
    subset: tuple[str, ...],
    text_column: str | None,
    truth: Path | None,
) -> None:
    """Read SRC, a file or folder of SOURCE, and write records.

    SOURCE is pathvqa, quilt-vqa, llava-med, pmc-vqa, quilt1m, records (anybody's CSV, JSON Lines or
    Parquet), or auto. Says which published test set it is, how many images were found, and lists
    what was set aside in OUT.rejected.jsonl. A pickle is read as data: nothing in it is run.

    \b
    Example:
      clover data import pathvqa pvqa/qas --images pvqa/images --out pathvqa.jsonl
      clover data import quilt1m quilt_1M_lookup.csv --images a.zip --images b.zip \\
          --subset pathology --text-column corrected_text --out quilt.jsonl
    """
    from clover.data.importer import import_file
    from clover.data.source.base import Options

    options = Options(subset, text_column, truth)
    summary = import_file(source, path, out=out, images=images, options=options)
    for line in summary.lines():
        click.echo(line)


@data.command()
@click.argument("path", metavar="F", type=_PATH)
@click.option("--against", type=_PATH, help="A second file that should share no image with F.")
@click.option("--out", type=_PATH, help="Write what should be set aside, a JSON line each.")
@click.option(
    "--images", type=_PATH, help="Where F's image paths start; its own folder by default."
)
@click.option("--against-images", type=_PATH, help="The same for the second file.")
@click.option("--strict", is_flag=True, help="Exit with 1 when the two files share anything.")
@click.pass_context
def check(
    context: click.Context,
    path: Path,
    against: Path | None,
    out: Path | None,
    images: Path | None,
    against_images: Path | None,
    strict: bool,
) -> None:
    """Look the records of F over: coverage, broken and duplicate images, licences, balance, splits.

    F is a file, or a folder of JSON Lines or Parquet shards, as clover align reads them.

    With --against also the leaks between two files: images of the same bytes, and pictures that are
    one another turned, mirrored, cropped or brightened. Name the smaller file second.

    \b
    Example:
      clover data check train.jsonl --against test.jsonl --out set-aside.jsonl --strict
    """
    from clover.data.check import check_file

    if strict and against is None:
        raise click.UsageError("--strict is about leaks: name the second file with --against")
    found = check_file(path, images=images, against=against, against_images=against_images, out=out)
    for line in found.lines():
        click.echo(line)
    if out is not None:
        click.echo(f"what should be set aside: {out}")
    if strict and found.has_leaks:
        context.exit(1)
