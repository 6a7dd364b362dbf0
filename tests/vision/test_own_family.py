"""docs/models.md, "Add a family of encoders: one file", done word by word."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from clover.core.config import EncoderConfig, load_recipe
from clover.core.errors import CloverError
from clover.vision.token_encoder import TokenEncoder
from tiny import Tiny

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
SECTION = PAGE.split("## Add a family of encoders: one file")[1].split("\n## ")[0]


def block(language: str) -> str:
    return re.findall(rf"```{language}\n(.*?)```", SECTION, flags=re.S)[0]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder in which a reader has done what the page says."""
    (tmp_path / "my-encoders").mkdir()
    (tmp_path / "my-encoders" / "mine.py").write_text(block("python"))
    generator = torch.Generator().manual_seed(0)
    shapes = {"patches.weight": (64, 3, 14, 14), "patches.bias": (64,)}
    shapes |= {"mix.weight": (64, 64), "mix.bias": (64,)}
    state = {f"model.{n}": torch.randn(s, generator=generator) for n, s in shapes.items()}
    save_file(state, str(tmp_path / "mine.safetensors"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLOVER_FAMILIES", "my-encoders")
    return tmp_path


def clover(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "clover.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ),
    )


def config() -> EncoderConfig:
    return EncoderConfig.model_validate(yaml.safe_load(block("yaml"))["encoder"])


def test_the_pages_own_recipe_is_one_as_printed(written: Path) -> None:
    (written / "mine.yaml").write_text(block("yaml"))
    assert load_recipe(written / "mine.yaml").encoder.kind == "mine"


def test_the_pages_own_family_fills_a_cache_trains_and_answers(written: Path, tiny: Tiny) -> None:
    tree = tiny.recipe.model_dump(mode="json", exclude_unset=True)
    tree |= yaml.safe_load(block("yaml"))
    tree["align"] |= {"steps": 2, "warmup_steps": 1}
    tree["tune"] |= {"steps": 2, "warmup_steps": 1}
    (written / "mine.yaml").write_text(yaml.safe_dump(tree))
    command = block("sh").split()
    assert command[:2] == ["CLOVER_FAMILIES=my-encoders", "clover"]
    features = [tiny.captions if item == "captions.jsonl" else item for item in command[2:]]
    filled = clover(*features)
    assert filled.returncode == 0, filled.stderr[-800:]
    assert "mine/patches" in filled.stdout or list((written / "features").glob("mine-patches-*"))
    tuned = clover(
        *("tune", "--recipe", "mine.yaml", "--data", tiny.instructions, "--out", "model")
    )
    assert tuned.returncode == 0, tuned.stderr[-800:]
    asked = clover("ask", "model", tiny.image(), "which tissue is shown ?")
    assert asked.returncode == 0, asked.stderr[-800:]
    assert "my own" in (written / "model" / "README.md").read_text()
    _opens_from_elsewhere(written, tiny)
    planned = clover("plan", "mine.yaml", "--set", f"language.weights={tiny.folder / 'llama'}")
    assert planned.returncode == 0, planned.stderr[-800:]
    assert "mine/patches, 41,856 parameters" in planned.stdout


def _opens_from_elsewhere(written: Path, tiny: Tiny) -> None:
    """Ask from another folder: weights are found as they lie to the model, code by the variable."""
    (written / "elsewhere").mkdir()
    question = ("ask", "../model", str(tiny.image()), "which tissue is shown ?")
    command = [sys.executable, "-m", "clover.cli", *question]
    for own, code in ((str(written / "my-encoders"), 0), ("my-encoders", 2)):
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            cwd=written / "elsewhere",
            env={**os.environ, "CLOVER_FAMILIES": own},
        )
        assert done.returncode == code, done.stderr[-800:]
    assert "CLOVER_FAMILIES names, my-encoders, and there is no such folder in" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_its_code_is_part_of_its_revision(written: Path) -> None:
    before = TokenEncoder(config())
    assert (before.num_tokens, before.width) == (16, 64)
    path = written / "my-encoders" / "mine.py"
    path.write_text(path.read_text().replace("torch.tanh", "torch.sin"))
    assert TokenEncoder(config()).revision != before.revision


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def build(config:", r"mine\.py does not run: SyntaxError"),
        ("import nothing_of_this_name", r"mine\.py does not run: ModuleNotFoundError"),
        ("x = 1", r"mine\.py has no build\(config\)"),
    ],
)
def test_a_file_that_is_no_family_is_one_line(written: Path, code: str, words: str) -> None:
    (written / "my-encoders" / "mine.py").write_text(code)
    with pytest.raises(CloverError, match=words) as caught:
        TokenEncoder(config())
    assert "\n" not in str(caught.value)


def test_a_recipe_alone_cannot_name_code(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLOVER_FAMILIES")
    for kind in ("mine", "my-encoders/mine", "./mine.py"):
        tree: dict[str, Any] = {"kind": kind}
        with pytest.raises(ValueError, match="no family"):
            EncoderConfig.model_validate(tree)
