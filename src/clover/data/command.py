"""The verb of this room: `clover data import`."""

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
