"""The verb `clover convert`: checkpoints between CLOVER, LAVIS and transformers."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

_SHOWN = 8


@click.command(
    epilog="Example: clover convert checkpoint.pth model/ --to clover --recipe clover-flant5xl"
)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--to", type=click.Choice(["clover", "lavis", "transformers"]), required=True, help="The form."
)
@click.option(
    "--encoder",
    type=click.Path(path_type=Path),
    help="EVA's weights, where SOURCE carries none and TARGET needs them.",
)
@click.option(
    "--language",
    type=click.Path(path_type=Path, file_okay=False),
    help="The language model's folder, likewise.",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The Q-Former's tokenizer.json, instead of SOURCE's own.",
)
@click.option(
    "--recipe",
    help="Names the frozen parts SOURCE has not, prompt and decoding; else a model's own.",
)
@click.option(
    "--heads", "num_heads", type=int, help="The Q-Former's heads, where SOURCE is silent."
)
@click.option("--no-check", is_flag=True, help="Do not run SOURCE and TARGET afterwards.")
def convert(source: Path, target: Path, to: str, no_check: bool, **options: Any) -> None:
    """Write the checkpoint SOURCE in another form to TARGET, and compare the two.

    SOURCE is a LAVIS or published CLOVER file, a transformers folder (BLIP-2, InstructBLIP), or a
    CLOVER folder. One tensor is in memory at a time; nothing in a pickle is run. What does not map
    is listed here and in TARGET. A stage 2 checkpoint becomes a model that `clover ask` opens, if
    SOURCE or --recipe has its frozen parts; what is missing is named.
    """
    from clover.convert.run import convert as run_convert

    done = run_convert(source, target, to=to, has_check=not no_check, **options)
    found = done.source
    click.echo(f"{found.form} -> {to}: {len(found.entries)} tensors, {done.written}")
    for title, names in (("left out", found.left_out), ("filled", found.filled)):
        for name, reason in list(names.items())[:_SHOWN]:
            click.echo(f"  {title}: {name} ({reason})")
        if len(names) > _SHOWN:
            click.echo(f"  {title}: {len(names) - _SHOWN} more, see convert.json beside it")
    for item in done.lacking:
        click.echo(f"  not yet a model: it lacks {item}")
    if to == "clover" and not done.lacking:
        model = shlex.quote(str(target))
        click.echo(f'  a model: clover ask {model} image.png "Is there necrosis?"')
    if done.parity is None:
        return
    click.echo(f"  equal bit by bit: {done.parity.num_equal} of {done.parity.num_shared} tensors")
    what = "all parts" if done.parity.is_whole else "the trained part; the rest bit by bit"
    for name, value in done.parity.differences.items():
        click.echo(f"  max abs difference of {name}: {value:.2g} ({what}, same random input)")
