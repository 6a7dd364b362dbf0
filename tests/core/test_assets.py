"""Pinned assets: parsed, unpacked, checked, and never half there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from clover.cli import main
from clover.core import assets
from clover.core.assets import home, parse, resolve
from clover.core.errors import CloverError
from tiny import write_wheel


@pytest.fixture(autouse=True)
def clover_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLOVER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def files_under(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_file_comes_out_of_a_wheel_on_the_shelf_and_stays(clover_home: Path) -> None:
    reference = write_wheel(clover_home, name="some_words", inner="a/b.txt", content=b"words")
    path = resolve(reference)
    assert path.read_bytes() == b"words" and path.is_relative_to(clover_home)
    (clover_home / "wheels" / "some_words-1.0-py3-none-any.whl").unlink()
    assert resolve(reference) == path


def test_a_dash_in_a_package_name_finds_its_wheel(clover_home: Path) -> None:
    write_wheel(clover_home, name="some_words", inner="a.txt", content=b"words")
    assert resolve("wheel://some-words==1.0/a.txt").read_bytes() == b"words"


def test_a_wrong_hash_leaves_nothing(clover_home: Path) -> None:
    reference = write_wheel(clover_home, name="x", inner="a.txt", content=b"words")
    wrong = reference[:-4] + "0000"
    before = files_under(clover_home)
    with pytest.raises(CloverError, match="nothing was kept") as error:
        resolve(wrong)
    assert "SHA-256" in str(error.value) and files_under(clover_home) == before


def test_a_file_the_wheel_lacks_and_a_broken_wheel_are_one_line(clover_home: Path) -> None:
    write_wheel(clover_home, name="x", inner="a.txt", content=b"words")
    with pytest.raises(CloverError, match=r"does not hold b\.txt"):
        resolve("wheel://x==1.0/b.txt")
    wheel = clover_home / "wheels" / "x-1.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes()[:40])
    with pytest.raises(CloverError, match="was broken and is removed"):
        resolve("wheel://x==1.0/a.txt")
    assert files_under(clover_home) == []


@pytest.mark.parametrize(
    "reference", ["wheel://some-words==1.0/a/b.txt", "hf://org/name@abc/model.safetensors"]
)
def test_offline_names_the_file_and_where_to_put_it(reference: str) -> None:
    with pytest.raises(CloverError) as error:
        resolve(reference)
    message = str(error.value)
    assert "CLOVER_OFFLINE" in message and str(parse(reference).path) in message
    assert "clover fetch" in message and "\n" not in message


def test_a_download_that_fails_says_why_and_leaves_nothing(
    clover_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--dest") + 1])
        (folder / "x-1.0-py3-none-any.whl.part").write_bytes(b"half")
        return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: connection reset\n")

    monkeypatch.setenv("CLOVER_OFFLINE", "0")
    monkeypatch.setattr(subprocess, "run", broken)
    with pytest.raises(CloverError, match=r"connection reset.*by hand"):
        resolve("wheel://x==1.0/a.txt")
    assert files_under(clover_home) == []


@pytest.mark.parametrize(
    "reference", ["wheel://name/a.txt", "wheel://name==1.0", "hf://name", "hf://a b/c"]
)
def test_a_reference_of_another_form_is_one_line(reference: str) -> None:
    with pytest.raises(CloverError, match="is not of the form"):
        parse(reference)


def test_parts_of_references() -> None:
    wheel = parse("wheel://gt-x==0.1.0/gt/model.bin?sha256=ab")
    assert (wheel.kind, wheel.name, wheel.version) == ("wheel", "gt-x", "0.1.0")
    assert (wheel.inner, wheel.sha256) == ("gt/model.bin", "ab")
    hub = parse("hf://org/name@main")
    assert (hub.name, hub.version, hub.inner) == ("org/name", "main", None)
    assert hub.path == home() / "hf" / "org--name" / "main"


def test_a_path_is_used_where_it_lies(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"w")
    assert resolve(str(path)) == resolve(f"path:{path}") == path
    with pytest.raises(CloverError, match="no file /nowhere"):
        resolve("/nowhere")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "pip brought no wheel"),
        ("python: No module named pip\n", "python: No module named pip"),
        ("WARNING: slow\nERROR: No matching distribution found for x==1\n", "No matching"),
        ("ERROR: Exception:\nTraceback:\n  File\nOSError: No space left\n", "OSError: "),
    ],
)
def test_a_failed_download_says_what_pip_failed_of(text: str, reason: str) -> None:
    assert assets._pip_reason(text).startswith(reason)


def test_without_pip_the_reason_and_the_nearest_fix_are_said(
    clover_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        said = "/venv/bin/python: No module named pip\n"
        return subprocess.CompletedProcess(command, 1, "", said)

    monkeypatch.setenv("CLOVER_OFFLINE", "0")
    monkeypatch.setattr(subprocess, "run", without_pip)
    with pytest.raises(CloverError, match=r"No module named pip\); .*-m ensurepip.*uv pip install"):
        resolve("wheel://x==1.0/a.txt")


def test_an_empty_home_counts_as_unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CLOVER_HOME", "")
    assert home() == tmp_path / ".cache" / "clover"


@pytest.mark.skipif(os.name == "nt", reason="home folders are found otherwise on Windows")
@pytest.mark.parametrize("verb", [["doctor"], ["fetch", "phantom"]])
def test_a_user_without_a_home_folder_is_told_to_set_clover_home(
    verb: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("CLOVER_HOME")
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(SystemExit) as stop:
        main(verb)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "set CLOVER_HOME" in err
    with pytest.raises(CloverError, match="without ~"):
        resolve("~/weights.bin")


def test_only_what_may_be_a_hubs_name_is_said_to_be_written_with_hf(tmp_path: Path) -> None:
    with pytest.raises(CloverError, match="a model hub's is written hf://lab/model"):
        resolve("lab/model")
    with pytest.raises(CloverError) as caught:
        resolve("path:models/eva_vit_g.pth")
    assert "models/eva_vit_g.pth" in str(caught.value) and "hf://" not in str(caught.value)
