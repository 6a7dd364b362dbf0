"""The verb `clover features`: run the frozen image encoder once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from clover.core.options import feature_option


@click.command(epilog="Example: clover features captions.jsonl --encoder phantom --out features/")
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--encoder",
    default="phantom",
    show_default=True,
    help="A recipe (name or file), whose encoder section is used.",
)
@click.option("--set", "settings", multiple=True, metavar="SECTION.KEY=VALUE")
@click.option("--out", "out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--images", type=click.Path(path_type=Path, file_okay=False))
@click.option("--verify", is_flag=True, help="First read every shard through; redo damaged ones.")
@click.option(
    "--storage",
    type=click.Choice(["float16", "bfloat16", "int8"]),
    help="Number format; the same as --set encoder.storage=FORMAT.",
)
@click.option(
    "--views", type=click.IntRange(1), help="Views an image; the same as --set encoder.views=N."
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes that share the work; the same command on other machines shares it too.",
)
@click.option("--ray", is_flag=True, help="Run the workers under Ray (extra [ray], RAY_ADDRESS).")
@feature_option
def features(data: Path, encoder: str, settings: tuple[str, ...], **options: Any) -> None:
    """Fill the feature cache with the images of DATA; what is there already is not computed again.

    Broken and missing images are counted and listed in OUT/rejected.jsonl. Damaged shards are moved
    to a folder named broken and made again.
    """
    from clover.core.config import load_recipe
    from clover.core.record import write_rejected
    from clover.vision.cache import FeatureCache
    from clover.vision.encoder import load_encoder
    from clover.vision.workers import FillJob, fill, fill_under_ray

    settings += tuple(
        f"encoder.{name}={options[name]}" for name in ("storage", "views") if options[name]
    )
    config = load_recipe(encoder, settings).encoder
    folder = options["out"] or options["cache"]
    if options["verify"]:
        cache = FeatureCache(folder, load_encoder(config), storage=config.storage)
        for shard in cache.verify():
            click.echo(f"{shard} was damaged; it lies in {shard.parent}/broken now", err=True)
    run = fill_under_ray if options["ray"] else fill
    found = run(FillJob(data, config, folder, options["images"]), workers=options["workers"])
    write_rejected(folder / "rejected.jsonl", found.rejected)
    tokens = found.cache.get(found.digests[:1])[0]
    click.echo(
        f"{found.summary()}; {found.cache.encoder_id}, {len(tokens)} tokens of {tokens.shape[1]}"
    )
    views = f", {config.views} views each" if config.views > 1 else ""
    click.echo(f"cache: {found.cache.path} ({len(found.cache):,} images{views})")
    for shard in found.cache.set_aside:
        click.echo(f"a torn shard was set aside and made again: {shard}", err=True)
