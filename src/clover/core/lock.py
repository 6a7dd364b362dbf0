"""A recipe's lock: what each of its references was when it was first fetched.

`clover fetch own.yaml` writes `own.lock.json` beside the recipe, or `CLOVER_HOME/locks/` for one
that comes with CLOVER: the SHA-256 of every file, and for a model hub the commit. From then on the
recipe means these files and no others; to move on to newer ones, delete the lock and fetch again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clover.core.assets import content, home, parse
from clover.core.errors import CloverError
from clover.core.files import read_json, write_json

Lock = dict[str, dict[str, Any]]
"""Recipe field -> reference, pinned reference, SHA-256 by file."""
SUFFIX = ".lock.json"


def lock_path(recipe: Path, *, is_shipped: bool) -> Path:
    """Return where the lock of a recipe lies, or would."""
    folder = home() / "locks" if is_shipped else recipe.parent
    return folder / f"{recipe.stem}{SUFFIX}"


def read_lock(path: Path) -> Lock:
    """Return a lock's entries by recipe field; none where there is no lock.

    Raises:
        CloverError: it is damaged.
    """
    if not path.is_file():
        return {}
    found = read_json(path)
    try:
        fields: Lock = found["fields"]
        for entry in fields.values():
            parse(entry["pinned"])
            assert isinstance(entry["reference"], str) and isinstance(entry["files"], dict)
    except (KeyError, TypeError, AttributeError, AssertionError) as error:
        raise CloverError(f"{path} is not a lock that `clover fetch` wrote; delete it") from error
    return fields


def entry(reference: str) -> dict[str, Any]:
    """Return what a lock says of a reference that has been fetched.

    A hub's becomes one with commit and SHA-256; a path keeps its name, its SHA-256 stands beside.
    """
    from clover.core.hub import files_of, hashes_of, manifest_digest

    asset = parse(reference)
    if asset.kind == "hf":
        files = hashes_of(asset)
        sha256 = files[asset.inner] if asset.inner else manifest_digest(files)
        version = asset.commit or asset.version or "main"
        inner = f"/{asset.inner}" if asset.inner else ""
        pinned = f"hf://{asset.name}@{version}{inner}?sha256={sha256}"
        return {"reference": reference, "pinned": pinned, "files": files}
    if asset.path.is_dir():
        named = files_of(asset.path)
        files = {name: str(content(str(path))) for name, path in named.items()}
    else:
        files = {asset.path.name: str(content(reference))}
    return {"reference": reference, "pinned": reference, "files": files}


def write_lock(path: Path, recipe: str, entries: Lock) -> None:
    """Write a lock."""
    write_json(path, {"recipe": recipe, "fields": entries})


def changed_files(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the files by which two entries of a lock differ."""
    old, new = before["files"], now["files"]
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
