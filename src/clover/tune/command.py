"""The verb `clover tune`: stage 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from clover.core.options import recipe_options, resolve_recipe, training_options


@click.command(
    epilog="Example: clover tune --recipe histology --data vqa_train.jsonl --from run/ --out model/"
)
@recipe_options
@click.option("--data", type=click.Path(path_type=Path), help="Records with questions and answers.")
@click.option(
    "--from",
    "start",
    type=click.Path(path_type=Path),
    help="Stage 1's run folder; without it the Q-Former starts from its BERT checkpoint.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("model"),
    show_default=True,
    help="The model folder.",
)
@click.option(
    "--run",
    type=click.Path(path_type=Path, file_okay=False),
    help="The run folder, for metrics and checkpoints; that of --from, else OUT.run.",
)
@training_options
def tune(recipe_name: str, settings: tuple[str, ...], out: Path, **options: Any) -> None:
    """Stage 2: teach the bridge to speak to the frozen language model, from instructions.

    Writes the model folder OUT and continues where it stopped when called again.
    """
    from clover.core.errors import CloverError
    from clover.tune.run import tune as run_tune

    recipe = resolve_recipe(
        recipe_name,
        settings,
        seed=options["seed"],
        stage="tune",
        checkpoint_every=options["checkpoint_every"],
        images=options["images"],
    )
    instructions = options["data"] or recipe.data.instructions
    if instructions is None:
        raise CloverError(f"recipe {recipe.name} names no data.instructions; give --data FILE")
    start = options["start"]
    if start is not None and start.is_dir():
        start = start / "align.safetensors"
    if start is not None and not start.exists():
        raise CloverError(f"no file {start}; --from takes a run folder that clover align finished")
    run = options["run"] or (start.parent if start else out.with_name(out.name + ".run"))
    result = run_tune(
        recipe,
        instructions=instructions,
        out=out,
        run=run,
        cache=options["cache"],
        start=start,
        max_steps=options["max_steps"],
    )
    click.echo(result.summary)
    if not result.is_finished:
        click.echo(f"stopped after {options['max_steps']} steps; the same command continues")
        return
    click.echo(f'{out}/; next: clover ask {out} IMAGE "What tissue is this?"')
