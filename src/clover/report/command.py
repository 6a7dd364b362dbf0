"""The verb `clover report`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(epilog="Example: clover report clover-demo --out report.html")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The page; RUN/report.html for one run, ./report.html for several.",
)
def report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write one self-contained HTML page for a run, or several side by side.

    A RUN is a folder that `clover demo --out` or `clover evaluate --out` wrote; whatever it does
    not hold is named on the page. Research use only, not for diagnosis.
    """
    from clover.report.page import write_comparison, write_report

    if len(runs) == 1:
        path = write_report(runs[0], out)
    else:
        path = write_comparison(runs, Path("report.html") if out is None else out)
    click.echo(f"{path} ({path.stat().st_size / 1024:,.0f} KiB, nothing else is needed to read it)")
