"""Fixtures for all tests: offline, one thread, a tiny model built once a session."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# Plain `pytest` does not put the project root on the path, where `benchmarks` lies.
sys.path.insert(0, str(ROOT))

from tiny import Tiny, build_tiny, tiny_clover  # noqa: E402

torch.set_num_threads(1)
if "PYTEST_XDIST_WORKER" in os.environ:  # a core each: so have the commands that a test starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")


_ALONE = "CLOVER_TEST_ALONE"
_done: dict[str, str | None] = {}
"""Node id -> what failed, of tests that ran in a process of their file's own."""


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run the `alone` tests of a file in a process of their own.

    They fork, and torch refuses backward in the child of a process whose autograd has started
    threads, as it does when a backward runs inside another (activation checkpointing).
    """
    if pyfuncitem.get_closest_marker("alone") is None or _ALONE in os.environ:
        return None
    if pyfuncitem.nodeid not in _done:
        items = [item for item in pyfuncitem.session.items if item.path == pyfuncitem.path]
        _run_alone([item.nodeid for item in items])
    failed = _done.get(pyfuncitem.nodeid, "it did not run")
    if failed is not None:
        pytest.fail(failed, pytrace=False)
    return True


def _run_alone(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"),
                *(f"--junitxml={report}", "-o", "junit_family=xunit1", *names),
            ],
            cwd=ROOT,
            env={**os.environ, _ALONE: "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        cases = ElementTree.parse(report).iter("testcase") if report.exists() else ()
        for case in cases:
            bad = [*case.findall("failure"), *case.findall("error")]
            name = f"{case.get('file')}::{case.get('name')}"
            _done[name] = bad[0].text or "it failed" if bad else None
    for name in names:
        _done.setdefault(name, done.stdout[-4000:] + done.stderr[-4000:])


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
