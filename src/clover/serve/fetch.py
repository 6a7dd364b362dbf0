"""The verb `clover fetch`: bring the models a recipe names into the cache, ahead of time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import click

from clover.core.assets import check_hash, home, parse, resolve
from clover.core.config import EncoderConfig, Recipe, load_recipe
from clover.core.errors import CloverError
from clover.core.terminal import progress


@dataclass(frozen=True)
class FetchedFile:
    """One file or folder a recipe needs, and whether it is the pinned one."""

    field: str
    path: Path
    num_bytes: int
    verdict: str
    """`ok`, `not pinned`, or `WRONG`."""


def asset_references(recipe: Recipe) -> dict[str, str]:
    """Return recipe field -> asset reference, for every file the recipe names."""
    named = {
        "encoder.weights": _encoder_weights(recipe.encoder),
        "qformer.weights": recipe.qformer.weights,
        "qformer.tokenizer": recipe.qformer.tokenizer,
        "language.weights": recipe.language.weights,
    }
    return {field: reference for field, reference in named.items() if reference}


def _encoder_weights(config: EncoderConfig) -> str | None:
    """Return the encoder's reference; one known by name has it in the register."""
    if config.kind != "known":
        return config.weights
    from clover.vision.family.known import expand

    return expand(config).weights


def fetch_file(field: str, reference: str) -> FetchedFile:
    """Resolve one reference and check its hash, also when it lay in the cache already.

    Raises:
        CloverError: it is absent and cannot be fetched.
    """
    try:
        path = resolve(reference)
    except CloverError as error:
        asset = parse(reference)
        if asset.kind != "path":
            raise CloverError(f"{field}: {error}") from error
        raise CloverError(
            f"{field}: no file {asset.path}, which the recipe expects there "
            f"(in {Path.cwd()}); put {asset.path.name} there, or name another under "
            f"{field} in the recipe"
        ) from error
    if path.is_dir():
        sizes = (item.stat().st_size for item in path.rglob("*") if item.is_file())
        return FetchedFile(field, path, sum(sizes), "not pinned")
    asset = parse(reference)
    verdict = "ok" if asset.sha256 else "not pinned"
    try:
        check_hash(path, asset)
    except CloverError:
        verdict = "WRONG"
    return FetchedFile(field, path, path.stat().st_size, verdict)


@click.command(epilog="Example: clover fetch phantom --to /media/stick/clover-home")
@click.argument("recipe")
@click.option(
    "--to",
    type=click.Path(path_type=Path, file_okay=False),
    help="Use this folder as CLOVER_HOME.",
)
def fetch(recipe: str, to: Path | None) -> None:
    """Bring every file that RECIPE names into the cache and check its SHA-256.

    For a closed network: run it where there is a network, carry the folder over, and set
    CLOVER_HOME and CLOVER_OFFLINE=1 there. Files that lie there already are only checked.
    """
    loaded = load_recipe(recipe)
    if to is not None:
        os.environ["CLOVER_HOME"] = str(to.expanduser().resolve())
    references = asset_references(loaded)
    files: list[FetchedFile] = []
    with progress("fetch", len(references)) as advance:
        for field, reference in references.items():
            files.append(fetch_file(field, reference))
            advance(1, field)
    _show(files)
    wrong = [item for item in files if item.verdict == "WRONG"]
    if wrong:
        raise CloverError(
            f"{wrong[0].path} does not have the SHA-256 that {wrong[0].field} names; "
            "delete it and run the same command again"
        )
    verb = "demo" if loaded.phantom is not None else f"align --recipe {recipe}"
    click.echo(f"Offline: CLOVER_HOME={home()} CLOVER_OFFLINE=1 clover {verb}")


def _show(files: list[FetchedFile]) -> None:
    width = max((len(item.field) for item in files), default=0)
    for item in files:
        size = f"{item.num_bytes / 1e6:,.1f} MB"
        click.echo(f"{item.field:<{width}}  {size:>12}  sha256 {item.verdict:<10}  {item.path}")
    total = sum(item.num_bytes for item in files) / 1e6
    click.echo(f"{len(files)} files, {total:,.1f} MB")
