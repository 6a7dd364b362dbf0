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
@click.option("--verify", is_flag=True, help="First drop shards that cannot be read whole.")
@feature_option
def features(data: Path, encoder: str, settings: tuple[str, ...], **options: Any) -> None:
    """Fill the feature cache with the images of DATA; what is there already is not computed again.

    Broken and missing images are counted and listed in OUT/rejected.jsonl.
    """
    from clover.core.config import load_recipe
    from clover.core.record import write_rejected
    from clover.vision.cache import FeatureCache
    from clover.vision.dataset import load_feature_set
    from clover.vision.encoder import load_encoder

    folder = options["out"] or options["cache"]
    loaded = load_encoder(load_recipe(encoder, settings).encoder)
    if options["verify"]:
        for shard in FeatureCache(folder, loaded).verify():
            click.echo(f"{shard} was broken and will be made again", err=True)
    found = load_feature_set(
        data, needs="any", encoder=loaded, cache=folder, images=options["images"]
    )
    write_rejected(folder / "rejected.jsonl", found.rejected)
    click.echo(f"{found.summary()}; {loaded.id}, {loaded.num_tokens} tokens of {loaded.width}")
    click.echo(f"cache: {found.cache.path} ({len(found.cache):,} images)")
