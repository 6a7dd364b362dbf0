"""The verb `clover align`: stage 1."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from clover.core.options import (
    held_out,
    leak_option,
    recipe_options,
    resolve_recipe,
    training_options,
)


@click.command(
    epilog="Example: clover align --recipe histology --data captions_train.jsonl --out run/"
)
@recipe_options
@click.option("--data", type=click.Path(path_type=Path), help="Records with captions.")
@click.option(
    "--validation",
    type=click.Path(path_type=Path),
    help="Held-out captions, for retrieval, at the end and every align.validate_every steps; "
    "refused where training holds their images.",
)
@leak_option
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("run"),
    show_default=True,
    help="The run folder.",
)
@training_options
def align(recipe_name: str, settings: tuple[str, ...], out: Path, **options: Any) -> None:
    """Stage 1: teach the Q-Former what captions say of images (contrast, match, caption).

    Writes OUT/align.safetensors and continues where it stopped when called again.
    """
    from clover.align.run import align as run_align
    from clover.core.errors import CloverError
    from clover.training import processes

    recipe = resolve_recipe(
        recipe_name,
        settings,
        seed=options["seed"],
        stage="align",
        checkpoint_every=options["checkpoint_every"],
        images=options["images"],
    )
    captions = options["data"] or recipe.data.captions
    if captions is None:
        raise CloverError(f"recipe {recipe.name} names no data.captions; give --data FILE")
    result = run_align(
        recipe,
        captions=captions,
        out=out,
        cache=options["cache"],
        validation=options["validation"],
        held_out=held_out(recipe, options),
        max_steps=options["max_steps"],
    )
    if not processes.is_first():
        return
    click.echo(result.summary)
    if not result.is_finished:
        click.echo(f"stopped after {options['max_steps']} steps; the same command continues")
        return
    if result.kept is not None:
        click.echo(result.kept)
    if result.scores is not None:
        for name, value in result.scores.row().items():
            click.echo(f"  {name:<24} {value:g}")
    command = shlex.join(["clover", "tune", "--recipe", recipe_name, "--from", str(out)])
    click.echo(f"{result.weights}; next: {command}")
