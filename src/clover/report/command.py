"""The verb `clover report`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(
    epilog="Example: clover report clover-demo --out report.html; "
    "clover report --table clover-demo; clover report --compare ours.jsonl theirs.jsonl"
)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The page; RUN/report.html for one run, ./report.html for several.",
)
@click.option("--table", "as_table", is_flag=True, help="Lay the runs beside published rows.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "latex", "html"]),
    default="text",
    show_default=True,
    help="Of the table.",
)
@click.option(
    "--set", "sets", multiple=True, help="Only this table: pathvqa or quilt-vqa; may be repeated."
)
@click.option(
    "--compare",
    "compared",
    is_flag=True,
    help="Each RUN is a prediction file: their answers side by side, with filters.",
)
@click.option("--images", type=click.Path(path_type=Path, file_okay=False), help="For --compare.")
@click.option(
    "--limit",
    type=click.IntRange(1),
    default=400,
    show_default=True,
    help="Questions on the page of --compare, those that the models disagree about first.",
)
def report(
    runs: tuple[Path, ...],
    out: Path | None,
    as_table: bool,
    form: str,
    sets: tuple[str, ...],
    compared: bool,
    images: Path | None,
    limit: int,
) -> None:
    """Write one self-contained HTML page for a run, or several side by side.

    A RUN is a folder that `clover demo --out` or `clover evaluate --out` wrote; whatever it does
    not hold is named on the page. With --table, a RUN may also be what `clover score --json`
    printed, and the table goes to the screen or to --out. With --compare, a RUN is a prediction
    file or a run folder. Research use only, not for diagnosis.
    """
    if as_table and compared:
        raise click.UsageError("--table and --compare are two reports; give one of them")
    if as_table:
        _write_table(runs, out, form, sets)
        return
    if compared:
        from clover.report.compare import write_compared

        path = write_compared(runs, out or Path("compare.html"), images=images, limit=limit)
    else:
        from clover.report.page import write_comparison, write_report

        if len(runs) == 1:
            path = write_report(runs[0], out)
        else:
            path = write_comparison(runs, Path("report.html") if out is None else out)
    click.echo(f"{path} ({path.stat().st_size / 1024:,.0f} KiB, nothing else is needed to read it)")


def _write_table(
    runs: tuple[Path, ...], out: Path | None, form: str, sets: tuple[str, ...]
) -> None:
    from clover.core.files import write_text
    from clover.report.published import FORMATS, read_ours, tables

    ours = [row for run in runs for row in read_ours(run)]
    text = FORMATS[form](tables(ours, sets))
    if out is None:
        click.echo(text)
    else:
        write_text(out, text.rstrip("\n") + "\n")
        click.echo(f"{out}")
