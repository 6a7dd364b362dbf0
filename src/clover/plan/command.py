"""The verb `clover plan`: memory, time and money before you start."""

from __future__ import annotations

import json
from typing import Any

import click

from clover.core.finite import NOT_NEGATIVE, POSITIVE


@click.command(epilog="Example: clover plan recipes/clover-vicuna7b.yaml --gpu 80 --price 2.5")
@click.argument("recipe")
@click.option("--gpu", "memory", type=POSITIVE, default=80.0, show_default=True, help="Its GiB.")
@click.option("--price", type=NOT_NEGATIVE, default=2.5, show_default=True, help="Dollars an hour.")
@click.option(
    "--tflops",
    type=POSITIVE,
    default=790.0,
    show_default=True,
    help="What a large bfloat16 product makes on it (an H100 by default); `clover doctor` says.",
)
@click.option(
    "--images",
    type=click.IntRange(0),
    default=100_000,
    show_default=True,
    help="To be encoded.",
)
@click.option("--set", "settings", multiple=True, metavar="SECTION.KEY=VALUE")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(recipe: str, settings: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Say what RECIPE needs: parameters, peak memory by part, hours, dollars, disk.

    One step of each stage is counted on torch's meta device; no weights are needed.
    """
    from clover.core.config import load_recipe
    from clover.plan.run import Card
    from clover.plan.run import plan as run_plan

    card = Card(options["memory"], options["tflops"], options["price"])
    found = run_plan(load_recipe(recipe, settings), card, images=options["images"])
    if as_json:
        click.echo(json.dumps(found.row()))
        return
    _show(found.row(), card)


def _show(row: dict[str, Any], card: Any) -> None:
    stages = ("features", "align", "tune")
    click.echo(
        f"{row['recipe']}\n"
        f"  image encoder   {row['encoder']}, {row['encoder_parameters']:,} parameters, "
        f"{row['encoder_numbers']}\n"
        f"  language model  {row['language']}, {row['tune']['frozen_parameters']:,} parameters, "
        f"{row['language_numbers']}\n"
        f"  what learns     {row['trained_numbers']}"
    )
    lines = [("", "".join(f"{name:>14}" for name in stages))]
    for label, key in (("learn", "trainable_parameters"), ("frozen", "frozen_parameters")):
        values = "".join(f"{row[stage][key] / 1e6:>13,.1f}M" for stage in stages)
        lines.append((f"{label}, parameters", values))
    for part in row["align"]["gib"]:
        values = "".join(f"{row[stage]['gib'][part]:>14.2f}" for stage in stages)
        lines.append((f"{part}, GiB", values))
    lines.append(("peak, GiB", "".join(f"{row['peak_gib'][stage]:>14.2f}" for stage in stages)))
    steps = [f"{row['features']['steps']:,} x 1"]
    steps += [f"{row[stage]['steps']:,} x {row[stage]['batch_size']}" for stage in stages[1:]]
    lines.append(("images or steps x batch", "".join(f"{text:>14}" for text in steps)))
    each = "".join(f"{row[stage]['tflop_a_step']:>14,.2f}" for stage in stages)
    lines.append(("TFLOP an image or step", each))
    each = "".join(f"{1000 * row['seconds_a_step'][stage]:>14,.1f}" for stage in stages)
    lines.append(("ms an image or step", each))
    for key in ("hours", "dollars"):
        lines.append((key, "".join(f"{_amount(row[key][stage]):>14}" for stage in stages)))
    for label, text in lines:
        click.echo(f"{label:<26}{text}")
    tune = row["tune"]
    if tune["steps_before"]:
        click.echo(
            f"tune has {tune['steps_before']:,} steps before these, without the language model: "
            f"{tune['tflop_a_step_before']:,.2f} TFLOP each"
        )
    click.echo(
        f"all three: {_amount(sum(row['hours'].values()))} hours, "
        f"{_amount(sum(row['dollars'].values()))} dollars, and {row['cache_gib']:,.1f} GiB of disk "
        f"for the features of {row['images']:,} images"
        + (f", {row['views']} views each" if row["views"] > 1 else "")
    )
    click.echo(
        f"hours where a large product makes {card.tflops:g} TFLOP/s, of which each stage gets the "
        f"share it was measured to get; dollars at {card.price:g} an hour; answers of the longest "
        "length in every row"
    )
    if row["fits"]:
        click.echo(f"It fits {card.memory_gib:g} GiB.")
    elif row["switch"]:
        click.echo(f"It does not fit {card.memory_gib:g} GiB; it does with {row['switch']}")
    else:
        click.echo(
            f"It does not fit {card.memory_gib:g} GiB, nor with any switch there is: take a "
            "smaller language model or encoder, or a larger card"
        )


def _amount(value: float) -> str:
    """Return hours or dollars; a little is not nothing."""
    return "< 0.01" if 0 < value < 0.01 else f"{value:,.2f}"
