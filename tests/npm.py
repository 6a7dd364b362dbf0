"""Packages of npm that tests use, fetched once into `CLOVER_HOME/test` by npm itself.

Which registry that is, npm knows; nothing of a package is run while it is fetched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

from clover.core.assets import home


def fetched(name: str, version: str) -> Path:
    """Return the folder of a package that stands alone, from the cache or from npm, or skip.

    It lies at `CLOVER_HOME/test/npm/NAME-VERSION/node_modules/NAME`, where Node finds it.
    """
    base = home() / "test" / "npm" / f"{name}-{version}"
    kept = base / "node_modules" / name
    if not kept.is_dir():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip(f"npm's {name} is not in the cache and there is no npm")
        base.parent.mkdir(parents=True, exist_ok=True)
        # Beside its place, so that it comes there whole or not at all.
        with tempfile.TemporaryDirectory(dir=base.parent) as folder:
            unpacked = _packed(npm, f"{name}@{version}", Path(folder))
            kept.parent.mkdir(parents=True, exist_ok=True)
            try:
                unpacked.rename(kept)
            except OSError:
                assert kept.is_dir()  # another worker was there first
    return kept


def _packed(npm: str, wanted: str, folder: Path) -> Path:
    try:
        done = subprocess.run(
            [npm, "pack", wanted, "--silent"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=300,  # no verdict: without network npm tries for long
            check=False,
            env={**os.environ, "npm_config_update_notifier": "false"},
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm's {wanted} is not in the cache and npm does not answer")
    if done.returncode:
        pytest.skip(f"npm's {wanted} is not in the cache and npm has none: {done.stderr[-200:]}")
    with tarfile.open(folder / done.stdout.split()[-1]) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"
