"""The verb `clover fetch`: bring the models a recipe names into the cache, ahead of time."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import click

from clover.core.assets import check_hash, expanded, home, parse, resolve
from clover.core.config import ASSETS, EncoderConfig, Recipe, load_recipe, lock_of
from clover.core.errors import CloverError
from clover.core.lock import Lock, changed_files, entry, read_lock, write_lock
from clover.language.dequantise import dequantised_folder


@dataclass(frozen=True)
class FetchedFile:
    """One file or folder a recipe needs, and whether it is the pinned one."""

    field: str
    path: Path
    num_bytes: int
    verdict: str
    """`ok`, `locked`, or `WRONG`."""


def asset_references(recipe: Recipe) -> dict[str, str]:
    """Return recipe field -> asset reference, for every file the recipe names."""
    named = {f"{part}.{field}": getattr(getattr(recipe, part), field) for part, field in ASSETS}
    named["encoder.weights"] = _encoder_weights(recipe.encoder)
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
    asset = parse(reference)
    if asset.kind == "wheel" and asset.path.exists():
        path = asset.path  # a file that was changed is listed as such
    else:
        path = _resolve(field, reference)
    if path.is_dir():
        sizes = (item.stat().st_size for item in path.rglob("*") if item.is_file())
        return FetchedFile(field, path, sum(sizes), "ok" if asset.sha256 else "locked")
    verdict = "ok" if asset.sha256 else "locked"
    try:
        check_hash(path, asset)
    except CloverError:
        verdict = "WRONG"
    return FetchedFile(field, path, path.stat().st_size, verdict)


def _resolve(field: str, reference: str) -> Path:
    try:
        return resolve(reference)
    except CloverError as error:
        asset = parse(reference)
        if asset.kind != "path" or asset.path.exists():
            raise CloverError(f"{field}: {error}") from error
        raise CloverError(
            f"{field}: no file {asset.path}, which the recipe expects there "
            f"(in {Path.cwd()}); put {asset.path.name} there, or name another under "
            f"{field} in the recipe"
        ) from error


def lock(recipe: str, loaded: Recipe, references: dict[str, str]) -> Path | None:
    """Write down what each reference was, where it was not written down before.

    Returns:
        The lock; None for a recipe that pins everything itself.

    Raises:
        CloverError: a file is another one than at the first fetch.
    """
    path = lock_of(recipe)
    before = read_lock(path)
    # A field that is pinned in the recipe needs no lock; one that the lock has pinned keeps it.
    kept = {f: item for f, item in before.items() if references.get(f) == item["pinned"]}
    entries: Lock = {}
    for field, reference in references.items():
        if parse(reference).sha256 is not None and field not in kept:
            continue
        now = entry(reference)
        if field in kept:
            if changed := changed_files(kept[field], now):
                raise CloverError(
                    f"{field}: {changed[0]} of {reference.split('?')[0]} is not the file that was "
                    f"locked ({len(changed)} of {len(now['files'])} differ); put that back, or "
                    f"delete {path} to lock what lies there now"
                )
            now = kept[field]
        elif field == "encoder.weights" and loaded.encoder.kind == "known":
            now["model"] = loaded.encoder.model
        entries[field] = now
    if not entries:
        return None
    if entries != before:
        write_lock(path, loaded.name, entries)
    return path


@click.command(epilog="Example: clover fetch phantom --to /media/stick/clover-home")
@click.argument("recipe")
@click.option(
    "--to",
    type=click.Path(path_type=Path, file_okay=False),
    help="Use this folder as CLOVER_HOME.",
)
def fetch(recipe: str, to: Path | None) -> None:
    """Bring every file that RECIPE names into the cache, check its SHA-256, and unpack it.

    For a closed network: run it where there is a network, carry the folder over, and set
    CLOVER_HOME and CLOVER_OFFLINE=1 there. Files that lie there already are only checked. The
    folder may then be read-only: using the models writes nothing.

    What RECIPE does not pin itself is locked: RECIPE.lock.json says which commit of a hub was
    fetched and the SHA-256 of each file; every verb keeps to it until you delete the lock.
    """
    if to is not None:
        os.environ["CLOVER_HOME"] = str(expanded(to).resolve())
    loaded = load_recipe(recipe)
    references = asset_references(loaded)
    files = [fetch_file(field, reference) for field, reference in references.items()]
    _show(files)
    wrong = [item for item in files if item.verdict == "WRONG"]
    if wrong:
        raise CloverError(
            f"{wrong[0].path} does not have the SHA-256 that {wrong[0].field} names; "
            "delete it and run the same command again"
        )
    if (path := lock(recipe, loaded, references)) is not None:
        click.echo(f"Locked: {path}")
    for item in files:
        if item.field == "language.weights" and item.path.suffix.lower() == ".gguf":
            # Now, and not when it is first asked: the cache may be read-only by then.
            click.echo(f"Unpacked: {dequantised_folder(item.path)}")
    verb = ["demo"] if loaded.phantom is not None else ["align", "--recipe", recipe]
    where = shlex.quote(str(home()))
    click.echo(f"Offline: CLOVER_HOME={where} CLOVER_OFFLINE=1 {shlex.join(['clover', *verb])}")


def _show(files: list[FetchedFile]) -> None:
    width = max((len(item.field) for item in files), default=0)
    for item in files:
        size = f"{item.num_bytes / 1e6:,.1f} MB"
        click.echo(f"{item.field:<{width}}  {size:>12}  sha256 {item.verdict:<10}  {item.path}")
    total = sum(item.num_bytes for item in files) / 1e6
    click.echo(f"{len(files)} files, {total:,.1f} MB")
