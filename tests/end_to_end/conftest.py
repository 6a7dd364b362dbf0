"""One fast demo with the real small models, shared by every test of this folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clover.core.assets import resolve
from clover.core.config import load_recipe
from clover.core.errors import CloverError


def run_clover(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "clover.cli", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.fixture(scope="session")
def real_models() -> None:
    """Fetch the three small models once; skip where no index and no cache has them."""
    recipe = load_recipe("phantom")
    references = (
        recipe.encoder.weights,
        recipe.qformer.weights,
        recipe.qformer.tokenizer,
        recipe.language.weights,
    )
    offline = os.environ.pop("CLOVER_OFFLINE", None)
    try:
        for reference in references:
            resolve(str(reference))
    except CloverError as error:
        pytest.skip(f"the small real models are not to be had here: {error}")
    finally:
        if offline is not None:
            os.environ["CLOVER_OFFLINE"] = offline


@pytest.fixture(scope="session")
def demo(real_models: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished `clover demo --fast`, run without network."""
    folder = tmp_path_factory.mktemp("demo")
    done = run_clover("demo", "--fast", "--out", "clover-demo", cwd=folder, CLOVER_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    (folder / "demo.txt").write_text(done.stdout, encoding="utf-8")
    return folder
