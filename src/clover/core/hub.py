"""Files of a model hub: fetched once, by commit, each with its SHA-256 written down.

In the cache: ``hf/ORG--NAME/COMMIT/`` holds the files, ``COMMIT.json`` beside it their manifest,
``main.ref`` the commit that `main` was when it was first asked for. A download is finished and
compared with the hub's own hashes in a folder of its own before anything moves to where models are
looked for; one that broke off is continued there. A folder put there by hand has no manifest and is
taken as it is.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from clover.core.assets import Asset, remembered_sha256
from clover.core.errors import CloverError, nearest
from clover.core.files import FULL, alone, disk_refused, read_json, write_json, write_text
from clover.core.terminal import progress

_WANTED = re.compile(
    r"^[^/]+\.safetensors$|^([\w-]+/)?[^/]+\.(json|txt|model|jinja|md)$|^LICENSE[^/]*$"
)
_UNWANTED = re.compile(r"^(onnx|openvino|original|runs)/|^consolidated|^\.")
"""Of a snapshot: weights as safetensors, tokenizer, configuration, licence. Never a pickle, which
can run code, nor the same weights for other programs. Pinned manifests depend on this choice."""
Manifest = dict[str, Any]
_ATTEMPTS = 3
_PARTIAL = 206


def manifest_digest(files: Mapping[str, str]) -> str:
    """Return the SHA-256 of `sha256sum`'s lines for the files, in order of their names."""
    lines = "".join(f"{files[name]}  {name}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def files_of(folder: Path) -> dict[str, Path]:
    """Return the files of a folder that a snapshot of it would have, by name."""
    found = {str(path.relative_to(folder).as_posix()): path for path in folder.rglob("*")}
    return {name: path for name, path in sorted(found.items()) if path.is_file() and _wants(name)}


def _wants(name: str) -> bool:
    return bool(_WANTED.match(name)) and not _UNWANTED.match(name)


def resolve_hub(asset: Asset, *, is_offline: bool) -> Path:
    """Return where a file or a snapshot of a hub lies, fetched when it may be.

    Raises:
        CloverError: absent and not to be fetched, changed since, or not what was pinned.
    """
    lacking = _lacking(asset)
    if lacking and is_offline:
        raise CloverError(_where(asset, lacking, len(_named(asset, read_manifest(asset)))))
    if lacking:
        with alone(asset.shelf.parent / ".fetch.lock"):
            if _lacking(asset):  # nobody else did meanwhile
                _fetch(asset)
    _check(asset, read_manifest(asset))
    return asset.path


def _lacking(asset: Asset) -> list[str]:
    """Return the files that are to be fetched; one without a name where they are not known yet.

    A folder of which single files were fetched is no snapshot.
    """
    manifest = read_manifest(asset)
    if manifest is None and asset.path.exists():
        return []
    named = _named(asset, manifest) or [""]
    return [name for name in named if not name or not (asset.folder / name).exists()]


def hashes_of(asset: Asset) -> dict[str, str]:
    """Return the SHA-256 of each file an asset has in the cache, by its name on the hub."""
    if asset.inner:
        return {asset.inner: remembered_sha256(asset.path)[0]}
    manifest = read_manifest(asset)
    if manifest is not None:
        return {name: entry["sha256"] for name, entry in manifest["files"].items() if _wants(name)}
    files = files_of(asset.path)
    return dict(zip(files, remembered_sha256(*files.values()), strict=True))


def read_manifest(asset: Asset) -> Manifest | None:
    """Return what was written down when an asset's commit was fetched; None if nothing was."""
    path = _note(asset.folder)
    if not path.is_file():
        return None
    found: Manifest = read_json(path)
    return found


def _note(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def _named(asset: Asset, manifest: Manifest | None) -> list[str]:
    """Return the files the asset stands for, as far as they are known; none when they are not."""
    if asset.inner:
        return [asset.inner]
    if manifest is None or not manifest["is_whole"]:
        return []
    return [name for name in manifest["files"] if _wants(name)]


def _where(asset: Asset, lacking: list[str], total: int) -> str:
    """Say offline which file goes where."""
    if total == 0 and asset.path.exists():
        return (
            f"CLOVER_OFFLINE is set and {asset.path} holds single files of {asset.name} alone; run "
            "`clover fetch` on a connected machine and copy its CLOVER_HOME, or put all files "
            f"there and delete {_note(asset.folder)}"
        )
    if asset.inner or total == 0:
        of = f"{asset.inner or 'all files'} of {asset.name} {asset.version or ''}".strip()
        path = asset.path
    else:
        of = f"{lacking[0]} of {asset.name} {asset.version or ''}".strip()
        of += f" ({len(lacking)} of {total} files are missing)"
        path = asset.path / lacking[0]
    return (
        f"CLOVER_OFFLINE is set and {path} is missing; put {of} there, "
        "or run `clover fetch` on a connected machine and copy its CLOVER_HOME"
    )


def _check(asset: Asset, manifest: Manifest | None) -> None:
    """Compare what lies there with what was fetched, and that with what the reference pins.

    Raises:
        CloverError: it differs.
    """
    stated = {} if manifest is None else manifest["files"]
    names = [name for name in _named(asset, manifest) if name in stated]
    paths = [asset.folder / name for name in names]
    for name, path, found in zip(names, paths, remembered_sha256(*paths), strict=True):
        if found != stated[name]["sha256"]:
            raise CloverError(
                f"{path} was changed since it was fetched: its SHA-256 is {found[:16]}…, that of "
                f"{asset.name} at {manifest['commit'] if manifest else ''} is "
                f"{stated[name]['sha256'][:16]}…; delete it and run `clover fetch` again"
            )
    if asset.sha256 is None:
        return
    files = hashes_of(asset)
    if _digest(asset, files) != asset.sha256:
        raise CloverError(_other(asset, asset.path, "delete that and run `clover fetch` again"))


def _digest(asset: Asset, files: Mapping[str, str]) -> str:
    return files[asset.inner] if asset.inner else manifest_digest(files)


def _other(asset: Asset, place: Path | None, remedy: str) -> str:
    what = "is another file than" if asset.inner else "holds other files than"
    return f"{place or asset.pin} {what} the SHA-256 of {asset.pin} pins; {remedy}"


def _fetch(asset: Asset) -> None:
    """Bring an asset into the cache: listed, downloaded, compared, moved."""
    try:
        from huggingface_hub import HfApi

        asked = asset.commit or asset.version or "main"
        info = HfApi().model_info(asset.name, revision=asked, files_metadata=True)
        commit = str(info.sha)
        staging = asset.shelf / f".{commit}.part"
        listed = {item.rfilename: item for item in info.siblings or []}
        brought: dict[str, Path] = {}
        for name in _choose(asset, listed):
            lying = asset.shelf / commit / name
            if not lying.exists():
                lying = staging / name
                _download(asset.name, commit, listed[name], lying)
            _compare(lying, listed[name], asset)
            brought[name] = lying
        files = dict(zip(brought, remembered_sha256(*brought.values()), strict=True))
        _accept(asset, commit, files, brought)
        shutil.rmtree(staging, ignore_errors=True)
    except CloverError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise disk_refused(asset.path, error) from error
        raise CloverError(_explain(error, asset)) from error


def _download(repository: str, commit: str, listed: Any, target: Path) -> None:
    """Download one file; a part that lies there from before is continued.

    huggingface_hub's own download begins anew in every process.
    """
    import httpx2
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    url = hf_hub_url(repository, listed.rfilename, revision=commit)
    target.parent.mkdir(parents=True, exist_ok=True)
    size = int(listed.size or 0)
    for attempt in range(_ATTEMPTS):
        done = target.stat().st_size if target.exists() else 0
        if target.exists() and done >= size:
            return
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if done:
            headers["Range"] = f"bytes={done}-"
        try:
            with (
                get_session().stream("GET", url, headers=headers, follow_redirects=True) as answer,
                progress(target.name[:18], size >> 20, done=done >> 20) as advance,
            ):
                hf_raise_for_status(answer)
                with target.open("ab" if answer.status_code == _PARTIAL else "wb") as out:
                    # As they come: what has arrived is on the disk when the line is cut.
                    for block in answer.iter_raw():
                        out.write(block)
                        advance((out.tell() >> 20) - (done >> 20))
                        done = out.tell()
        except (ConnectionError, TimeoutError, httpx2.TransportError):
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(attempt)


def _choose(asset: Asset, listed: Iterable[str]) -> list[str]:
    if asset.inner:
        if asset.inner not in listed:
            raise CloverError(
                f"{asset.name} has no file {asset.inner}{nearest(asset.inner, list(listed))}"
            )
        return [asset.inner]
    wanted = [name for name in sorted(listed) if _wants(name)]
    if not any(name.endswith(".safetensors") for name in wanted):
        raise CloverError(
            f"{asset.name} has no safetensors, and pickles are not read from strangers; name "
            f"another revision or a copy that has them, or one file as hf://{asset.name}/FILE"
        )
    return wanted


def _compare(path: Path, listed: Any, asset: Asset) -> None:
    """Compare a downloaded file with the hash the hub states: SHA-256, or git's for small files."""
    if listed.lfs is not None:
        is_right = remembered_sha256(path)[0] == listed.lfs.sha256
    elif listed.blob_id:
        data = path.read_bytes()
        is_right = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == listed.blob_id
    else:
        return
    if not is_right:
        path.unlink()
        raise CloverError(
            f"{listed.rfilename} of {asset.name} did not arrive as the hub has it; nothing was "
            "kept of it, run the same command again"
        )


def _accept(asset: Asset, commit: str, files: dict[str, str], lying: dict[str, Path]) -> None:
    """Write the manifest, then move the files: one that is listed and absent is fetched again.

    Raises:
        CloverError: the files are not those that the reference pins; none is kept.
    """
    folder = asset.shelf / commit
    if asset.sha256 is not None and _digest(asset, files) != asset.sha256:
        shutil.rmtree(asset.shelf / f".{commit}.part", ignore_errors=True)
        raise CloverError(
            _other(asset, None, "the hub serves something else now; nothing was kept")
        )
    note = _note(folder)
    before: Manifest = read_json(note) if note.is_file() else {"files": {}, "is_whole": False}
    entries = {
        name: {"sha256": files[name], "bytes": path.stat().st_size} for name, path in lying.items()
    }
    write_json(
        note,
        {
            "repository": asset.name,
            "commit": commit,
            "is_whole": before["is_whole"] or asset.inner is None,
            "files": before["files"] | entries,
        },
    )
    if (version := asset.version or "main") != commit and asset.commit is None:
        write_text(asset.shelf / f"{version}.ref", f"{commit}\n")
    for name, path in lying.items():
        if path != folder / name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            path.replace(folder / name)


def _explain(error: Exception, asset: Asset) -> str:
    """Say in one line why a hub did not give a file, and what helps."""
    from huggingface_hub.constants import ENDPOINT

    page = f"{ENDPOINT}/{asset.name}"
    kind = type(error).__name__
    if kind == "GatedRepoError":
        return f"{asset.name} is gated: ask for access at {page}, then `hf auth login`"
    if kind == "RepositoryNotFoundError":
        return f"the hub has no {asset.name}, or it is private: see {page}, or `hf auth login`"
    if kind == "RevisionNotFoundError":
        return f"{asset.name} has no revision {asset.version}; see {page}/commits"
    line = (str(error).splitlines() or [kind])[0]
    return (
        f"cannot fetch {asset.pin}: {line}; run the same command again, it goes on where it "
        f"stopped, or put it at {asset.path} by hand"
    )
