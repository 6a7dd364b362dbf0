"""Options that several verbs share, so that they are spelt and explained alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from clover.core.assets import home
from clover.core.config import Recipe, load_recipe

Command = TypeVar("Command", bound=Callable[..., Any])


def recipe_options(command: Command) -> Command:
    """Add --recipe, which must be given, --set and --seed."""
    return _recipe_options(command, is_required=True)


def optional_recipe_options(command: Command) -> Command:
    """The same for a verb that can do without a recipe."""
    return _recipe_options(command, is_required=False)


def _recipe_options(command: Command, *, is_required: bool) -> Command:
    decorators = (
        click.option(
            "--recipe",
            "recipe_name",
            required=is_required,
            help="A recipe file, or the name of one that comes with CLOVER (phantom, histology).",
        ),
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="SECTION.KEY=VALUE",
            help="Change a value of the recipe; may be given several times.",
        ),
        click.option("--seed", type=int, help="The same as --set seed=N."),
    )
    for decorate in reversed(decorators):
        command = decorate(command)
    return command


def training_options(command: Command) -> Command:
    """Add --features, --images, --max-steps and --checkpoint-every."""
    decorators = (
        feature_option,
        click.option(
            "--images",
            type=click.Path(path_type=Path, file_okay=False),
            help="Where relative image paths start; the data file's own folder by default.",
        ),
        click.option(
            "--max-steps", type=click.IntRange(1), help="Stop after so many steps; go on later."
        ),
        click.option("--checkpoint-every", type=click.IntRange(1), help="Steps between saves."),
    )
    for decorate in reversed(decorators):
        command = decorate(command)
    return command


def feature_option(command: Command) -> Command:
    """Add --features: where the cache of image features lies."""
    return click.option(
        "--features",
        "cache",
        type=click.Path(path_type=Path, file_okay=False),
        default=lambda: home() / "features",
        help="The feature cache; by default under CLOVER_HOME.",
    )(command)


def leak_option(command: Command) -> Command:
    """Add --allow-leaks: go on where training and evaluation share images."""
    return click.option(
        "--allow-leaks",
        is_flag=True,
        help="Go on where training and evaluation data share images or groups.",
    )(command)


def held_out(recipe: Recipe, options: dict[str, Any]) -> tuple[Path, ...]:
    """Return the files that training must share nothing with: --validation and the recipe's.

    None with --allow-leaks.
    """
    if options["allow_leaks"]:
        return ()
    named = (options["validation"], recipe.data.validation)
    return tuple(dict.fromkeys(path for path in named if path is not None))


def resolve_recipe(
    recipe_name: str,
    settings: tuple[str, ...],
    *,
    seed: int | None = None,
    stage: str | None = None,
    checkpoint_every: int | None = None,
    images: Path | None = None,
) -> Recipe:
    """Load a recipe with what the options changed."""
    extra = [] if seed is None else [f"seed={seed}"]
    if checkpoint_every is not None and stage is not None:
        extra.append(f"{stage}.checkpoint_every={checkpoint_every}")
    if images is not None:
        extra.append(f"data.images={images}")
    return load_recipe(recipe_name, (*settings, *extra))
