"""The verb `clover demo`."""

from __future__ import annotations

from pathlib import Path

import click

_FAST = (
    "phantom.images=48",
    "phantom.validation_images=8",
    "instruct.generated=2",
    "align.steps=3",
    "align.batch_size=8",
    "tune.grounding_steps=3",
    "tune.anchoring_steps=3",
    "tune.grounding_batch_size=6",
    "tune.steps=3",
    "tune.batch_size=4",
    "evaluate.control_items=8",
    "evaluate.bootstrap=100",
    "evaluate.max_tokens=8",
)


@click.command(epilog="Example: clover demo --out clover-demo")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("clover-demo"),
    show_default=True,
    help="Where everything goes; call again to continue.",
)
@click.option(
    "--fast", is_flag=True, help="A smoke run of under a minute; its scores mean nothing."
)
@click.option("--recipe", default="phantom", show_default=True, help="A recipe with a phantom.")
@click.option("--set", "settings", multiple=True, metavar="SECTION.KEY=VALUE")
def demo(out: Path, fast: bool, recipe: str, settings: tuple[str, ...]) -> None:
    """Run the whole recipe on synthetic histology: captions in, a model to talk to out.

    Instructions, features, stage 1, stage 2, evaluation with controls, report. Needs no GPU and no
    model hub: three small real models come out of wheels (about 190 MB, once).
    """
    from clover.core.config import load_recipe
    from clover.core.errors import CloverError
    from clover.training import processes

    # Most of its stages know nothing of other processes: each would write the same files.
    processes.refuse_several("clover demo")
    from clover.demo.run import run_demo

    loaded = load_recipe(recipe, (*(_FAST if fast else ()), *settings))
    if loaded.phantom is None:
        raise CloverError(f"recipe {loaded.name} has no phantom section; try --recipe phantom")
    run_demo(loaded, out, say=click.echo)
    if fast:
        click.echo("\n--fast was a smoke run: these scores mean nothing.")
