"""A model folder opens wherever it lies with its files, and says what it lacks otherwise."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from clover.cli import cli as main
from clover.core.errors import CloverError
from clover.core.files import read_json, write_json
from clover.model import load, read_config, recipe_of
from clover.training.device import choose_device
from tiny import Tiny, tiny_clover, tiny_recipe

LONG = "is there anything that speaks for colon or for liver in this image ? " * 12


@pytest.fixture
def made(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder in which a model was made whose files are named from there."""
    folder = tmp_path / "fam"
    folder.mkdir()
    shutil.copy(tiny.folder / "tokenizer.json", folder / "words.json")
    shutil.copytree(tiny.folder / "llama", folder / "parts" / "llama")
    monkeypatch.chdir(folder)
    recipe = tiny_recipe(
        tiny.folder,
        qformer={"tokenizer": "path:words.json"},
        language={"weights": "parts/llama"},
    )
    tiny_clover(recipe).save(Path("runs/a/model"))
    return folder


def test_it_opens_from_elsewhere_and_after_a_move(
    made: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = str(load("runs/a/model").ask(tiny.image(), "which tissue is shown ?"))
    monkeypatch.chdir(made.parent)
    assert str(load("fam/runs/a/model").ask(tiny.image(), "which tissue is shown ?")) == here
    made.rename(made.parent / "moved")
    moved = load("moved/runs/a/model")
    assert str(moved.ask(tiny.image(), "which tissue is shown ?")) == here
    text = (made.parent / "moved" / "runs" / "a" / "model" / "config.json").read_text()
    assert str(made) not in text  # nothing of this machine goes with it


def test_what_lies_in_the_folder_of_the_command_comes_first(made: Path, tmp_path: Path) -> None:
    config = read_config(Path("runs/a/model"))
    assert config["recipe"]["qformer"]["tokenizer"] == "path:words.json"
    assert config["recipe"]["language"]["weights"] == "parts/llama"


def test_a_file_that_is_nowhere_is_named_with_field_folder_and_fix(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.move(made / "runs", tmp_path / "alone")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CloverError) as error:
        load("alone/a/model")
    said = str(error.value)
    assert said.startswith("alone/a/model/config.json: qformer.tokenizer: no file words.json in ")
    assert str(tmp_path) in said and "write the whole path" in said and "\n" not in said


def test_a_folder_that_was_made_before_still_opens(made: Path) -> None:
    path = Path("runs/a/model/config.json")
    config = read_json(path)
    assert config.pop("paths_start") == "../../.."
    write_json(path, config)
    load("runs/a/model")


def test_whole_paths_note_no_start(tiny: Tiny, tmp_path: Path) -> None:
    tiny_clover(tiny.recipe).save(tmp_path / "model")
    assert "paths_start" not in read_json(tmp_path / "model" / "config.json")


def test_a_question_longer_than_the_positions_loses_its_beginning(
    tiny: Tiny, tmp_path: Path
) -> None:
    # As it was written before: its questions may be longer than the positions it has.
    recipe = tiny_recipe(tiny.folder, tune={"max_question_tokens": 128})
    tiny_clover(recipe).save(tmp_path)
    model = load(tmp_path)
    assert model.ask(tiny.image(), LONG).model == "tiny"
    tokens = model.question_tokens([LONG, "is this colon ?"])
    assert tokens is not None and tokens.ids.shape[1] == recipe.qformer.max_positions == 64


def test_a_value_out_of_range_in_a_folder_is_named_with_the_folder(
    tiny: Tiny, tmp_path: Path
) -> None:
    tiny_clover(tiny.recipe).save(tmp_path)
    config = read_config(tmp_path)
    config["recipe"]["qformer"]["num_heads"] = 5
    with pytest.raises(CloverError, match=r"config\.json, its recipe: qformer: num_heads 5"):
        recipe_of(config, tmp_path)


@pytest.mark.parametrize("precision", ["fp16", "float16", "int8", ""])
def test_a_number_format_that_is_none_is_a_line_with_those_that_are(precision: str) -> None:
    with pytest.raises(CloverError) as error:
        choose_device("cpu", precision)  # type: ignore[arg-type]
    assert str(error.value) == f"no precision '{precision}'; known: auto, float32, bfloat16"


def test_load_says_so_too(tiny: Tiny, tmp_path: Path) -> None:
    tiny_clover(tiny.recipe).save(tmp_path)
    with pytest.raises(CloverError, match="no precision 'fp16'"):
        load(tmp_path, precision="fp16")


@pytest.mark.parametrize(
    ("field", "value"), [("language", 3), ("encoder", "x"), ("qformer", None), ("", ["x"])]
)
def test_a_recipe_that_is_none_is_one_line_with_paths_and_without(
    made: Path, field: str, value: object
) -> None:
    path = made / "runs" / "a" / "model" / "config.json"
    config = read_json(path)
    assert config["paths_start"] == "../../.."
    if field:
        config["recipe"][field] = value
    else:
        config["recipe"] = value
    write_json(path, config)
    with pytest.raises(CloverError, match="its recipe"):
        load(path.parent)


@pytest.mark.parametrize("start", [3, ["x"], {}, None])
def test_a_start_of_paths_that_is_no_text_counts_as_absent(made: Path, start: object) -> None:
    path = made / "runs" / "a" / "model" / "config.json"
    write_json(path, {**read_json(path), "paths_start": start})
    load(path.parent)


def test_a_nul_in_a_path_is_one_line(made: Path) -> None:
    path = made / "runs" / "a" / "model" / "config.json"
    config = read_json(path)
    config["recipe"]["language"]["weights"] = "a\0b"
    write_json(path, config)
    with pytest.raises(CloverError, match="NUL"):
        load(path.parent)


def test_convert_asks_for_no_part_that_the_target_does_not_hold(made: Path, tmp_path: Path) -> None:
    shutil.rmtree(made / "parts")
    with pytest.raises(CloverError, match=r"language\.weights: no file"):
        load("runs/a/model")
    out = tmp_path / "lavis.pth"
    main(["convert", "runs/a/model", str(out), "--to", "lavis"], standalone_mode=False)
    assert out.exists()
