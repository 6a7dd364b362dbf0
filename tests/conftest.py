"""Fixtures for all tests: offline, one thread, a tiny model built once a session."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# Plain `pytest` does not put the project root on the path, where `benchmarks` lies.
sys.path.insert(0, str(ROOT))

from tiny import Tiny, build_tiny, tiny_clover  # noqa: E402

torch.set_num_threads(1)
if "PYTEST_XDIST_WORKER" in os.environ:  # a core each: so have the commands that a test starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def offline(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbid the network to every test that is not marked `real`."""
    if request.node.get_closest_marker("real") is None:
        monkeypatch.setenv("CLOVER_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_model(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model folder with an untrained bridge: it answers, if only nonsense."""
    return tiny_clover(tiny.recipe).save(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of reference files beside the project, or skip."""
    folder = ROOT.parent / "shared"
    if not (folder / "reference").exists():
        pytest.skip("no ../shared/reference beside the project")
    return folder
