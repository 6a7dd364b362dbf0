"""One training a folder: another process is refused, one that is killed is out of the way."""

from __future__ import annotations

import errno
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clover.core import files
from clover.core.errors import CloverError
from clover.core.files import held
from clover.demo.run import run_demo
from stage import STAGES, Stage, run_stage
from tiny import Tiny
from together import start_together

_HOLDER = """
import sys, time
from pathlib import Path
from clover.core.files import held
with held(Path(sys.argv[1]), "trains in it"):
    print("inside", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start another process that trains in `tmp_path / "run"`, as far as anybody can tell."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path / "run" / ".lock")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "inside\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("stage", STAGES)
def test_a_second_training_in_a_folder_is_refused_and_a_killed_one_is_no_first(
    stage: Stage, tiny: Tiny, tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    out = tmp_path / "run"
    words = rf"^another process trains in {out} \(process {holder.pid}\); wait until it has ended$"
    with pytest.raises(CloverError, match=words):
        run_stage(stage, tiny, out)
    assert [path.name for path in out.iterdir()] == [".lock"]
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert run_stage(stage, tiny, out).exists()
    assert not list(out.rglob(".lock"))


def test_two_run_folders_do_not_share_a_model_folder(
    tiny: Tiny, tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model").symlink_to(tmp_path / "run")
    with pytest.raises(CloverError, match=rf"trains in .*model \(process {holder.pid}\)"):
        run_stage("tune", tiny, tmp_path / "other")


def test_the_command_says_so_in_a_line(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(tiny.recipe.to_yaml())
    command = [sys.executable, "-m", "clover.cli", "align", "--recipe", str(recipe)]
    command += ["--data", str(tiny.captions), "--out", str(tmp_path / "run"), "--seed", "2"]
    with held(tmp_path / "run" / ".lock", "trains in it"):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"another process trains in {tmp_path / 'run'} (process {os.getpid()})" in done.stderr


def test_another_machines_process_is_named_with_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: subprocess.Popen[str]
) -> None:
    there = platform.node()
    monkeypatch.setattr(platform, "node", lambda: "elsewhere")
    with (
        pytest.raises(CloverError, match=rf"\(process {holder.pid} on {there}\)"),
        held(tmp_path / "run" / ".lock", "trains in it"),
    ):
        pass


@pytest.mark.alone  # forks
def test_several_processes_are_one_training_and_all_of_them_are_refused(
    tiny: Tiny, tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    work = lambda _: str(run_stage("align", tiny, tmp_path / "run"))  # noqa: E731
    codes, errors = start_together(work, tmp_path / "said")
    assert sorted(map(str, codes)) == ["1", "2"] and len(errors) == 1
    assert f"(process {holder.pid})" in errors[0]
    holder.kill()
    holder.wait()
    codes, errors = start_together(work, tmp_path / "again")
    assert codes == [0, 0], errors
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_stage_may_run_in_a_folder_that_its_own_process_holds(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with held(out / ".lock", "trains in it"):
        assert run_stage("align", tiny, out).exists()
        assert (out / ".lock").exists()  # still held
        assert run_stage("tune", tiny, out).exists()
    assert not list(out.rglob(".lock"))


def test_a_demo_does_not_begin_where_another_process_trains(
    tiny: Tiny, tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    with pytest.raises(CloverError, match=rf"\(process {holder.pid}\)"):
        run_demo(tiny.recipe, tmp_path / "run", say=print)


def test_a_folder_that_was_made_for_the_lock_alone_goes_with_it(tmp_path: Path) -> None:
    with held(tmp_path / "a" / ".lock", "trains in it"):
        assert (tmp_path / "a").is_dir()
    assert not (tmp_path / "a").exists()


def test_a_file_system_without_locks_trains_as_before(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    assert files.fcntl is not None
    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    assert run_stage("align", tiny, tmp_path / "run").exists()
    monkeypatch.setattr(files, "fcntl", None)  # Windows
    assert run_stage("align", tiny, tmp_path / "other").exists()


def test_another_thread_is_another_training(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with held(lock, "trains here"), held(lock, "trains here"), ThreadPoolExecutor(1) as pool:

        def come_in() -> None:
            with held(lock, "trains here"):
                pass

        with pytest.raises(CloverError, match="another thread of this process trains here"):
            pool.submit(come_in).result()
        assert lock.exists()
    assert not lock.exists()
    with held(lock, "trains here"):
        assert lock.exists()
