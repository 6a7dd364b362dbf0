"""The verb `clover tune`: stage 2."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from clover.core.options import (
    held_out,
    leak_option,
    optional_recipe_options,
    resolve_recipe,
    training_options,
)


@click.command(
    epilog="Example: clover tune --recipe histology --data vqa_train.jsonl --from run/ --out model/"
)
@optional_recipe_options
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Records with questions and answers; with --shots labelled images: FOLDER/CLASS/*.png, "
    "or a table of image,label.",
)
@click.option(
    "--from",
    "start",
    type=click.Path(path_type=Path),
    help="Stage 1's run folder; without it the Q-Former starts from its BERT checkpoint. With "
    "--shots the tuned model folder.",
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
@click.option(
    "--validation",
    type=click.Path(path_type=Path),
    help="What will be evaluated, and every tune.validate_every steps is; refused where training "
    "holds its images.",
)
@leak_option
@click.option(
    "--shots",
    metavar="K[,K...]",
    help="Few-shot: learn to tell the classes of --data from so many images of each.",
)
@click.option(
    "--seeds", type=click.IntRange(1), default=5, show_default=True, help="Draws of each K."
)
@click.option("--question", help="With --shots: what is asked of every image.")
@click.option(
    "--answers", metavar="LABEL=ANSWER[,...]", help="With --shots: answers that stand for labels."
)
@click.option(
    "--beside",
    multiple=True,
    metavar="NAME=MODEL",
    help="With --shots: a further model folder, or stage 1's run folder, in the same curve.",
)
@training_options
def tune(recipe_name: str | None, settings: tuple[str, ...], out: Path, **options: Any) -> None:
    """Stage 2: teach the bridge to speak to the frozen language model, from instructions.

    Writes the model folder OUT and continues where it stopped when called again. With --shots it
    teaches a tuned model to tell classes apart from a few labelled images, and writes a curve
    beside a linear probe and the nearest class mean of the same frozen features.

    \b
    Example:
      clover tune --recipe histology --data vqa_train.jsonl --from run/ --out model/
      clover tune --from model/ --data patches/ --shots 1,2,4,8,16,32 --out few-shot/
    """
    from clover.core.errors import CloverError
    from clover.training import processes
    from clover.tune.run import tune as run_tune

    if options["shots"] is not None:
        processes.refuse_several("--shots")
        _few_shot(out, options)
        return
    if recipe_name is None:
        raise click.UsageError("Missing option '--recipe'.")
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
        validation=options["validation"] or recipe.data.validation,
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
    model = shlex.quote(str(out))
    click.echo(f'{out}/; next: clover ask {model} IMAGE "What tissue is this?"')


def _few_shot(out: Path, options: dict[str, Any]) -> None:
    from clover.tune.curve import curve_lines
    from clover.tune.labelled import QUESTION
    from clover.tune.shots import ShotJob, tune_shots

    for name, what in (("start", "--from MODEL, a tuned model folder"), ("data", "--data")):
        if options[name] is None:
            raise click.UsageError(f"--shots needs {what}")
    shots = _numbers(options["shots"])
    result = tune_shots(
        ShotJob(
            options["start"],
            options["data"],
            out,
            options["cache"],
            shots,
            seeds=options["seeds"],
            validation=options["validation"],
            images=options["images"],
            question=options["question"] or QUESTION,
            answers=_pairs("--answers", (options["answers"] or "").split(",")),
            beside={
                name: Path(path) for name, path in _pairs("--beside", options["beside"]).items()
            },
            allow_leaks=options["allow_leaks"],
        )
    )
    click.echo(f"{result['question']}  answers: {', '.join(result['answers'])}")
    click.echo(f"{result['test_images']:,} test images, {options['seeds']} draws of each number")
    for line in curve_lines(result):
        click.echo(line)
    click.echo(f"{out / 'shots.svg'}, {out / 'shots.json'}, taught by most shots: {out / 'model'}/")
    click.echo("research use only, not for diagnosis")


def _numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of ``1,2,4``, each once and in order."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    bad = [part for part in parts if not part.isdecimal() or int(part) < 1]
    if bad or not parts:
        raise click.UsageError(f"--shots '{text}' is not a list of numbers such as 1,2,4")
    return tuple(sorted({int(part) for part in parts}))


def _pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    """Return NAME=VALUE texts as a mapping."""
    found = {}
    for text in given:
        if not text.strip():
            continue
        name, separator, value = text.partition("=")
        if not separator or not name.strip() or not value.strip():
            raise click.UsageError(f"{option} '{text}' is not of the form NAME=VALUE")
        found[name.strip()] = value.strip()
    return found
