"""The model folder: what is saved answers as before, and what is damaged says so in one line."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import clover
from clover.core.errors import CloverError
from clover.core.files import read_json, sha256_file, write_json
from clover.language.protocol import GenerationSettings
from clover.model import NOTICE, Clover, _language_weights, load, open_image
from tiny import QUESTION, Tiny, tiny_clover, tiny_recipe

QUESTIONS = [QUESTION, "is this liver ?", "describe the image"]


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """Return a copy of the model folder that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def answers(model: Clover, tiny: Tiny) -> list[str]:
    return [
        model.ask(tiny.image(tissue), question).text
        for tissue in ("liver", "colon")
        for question in QUESTIONS
    ]


def test_a_loaded_model_answers_as_the_one_that_was_saved(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny_clover(tiny.recipe)
    loaded = clover.load(model.save(tmp_path / "model"))
    assert answers(loaded, tiny) == answers(model, tiny)
    features = model.encode(tiny.image())
    assert torch.equal(
        loaded.visual_prefix(features, [QUESTION]), model.visual_prefix(features, [QUESTION])
    )
    # Answers that depend on nothing would pass the comparison too.
    assert len(set(answers(model, tiny))) > 1


def test_saving_what_was_loaded_writes_the_same_bytes(tiny_model: Path, tmp_path: Path) -> None:
    again = load(tiny_model).save(tmp_path / "again")
    assert sha256_file(again / "bridge.safetensors") == sha256_file(
        tiny_model / "bridge.safetensors"
    )
    assert read_json(again / "config.json") == read_json(tiny_model / "config.json")


def test_only_what_was_trained_is_written_and_the_card_says_what_it_is(tiny_model: Path) -> None:
    names = {path.name for path in tiny_model.iterdir()}
    assert names == {"config.json", "bridge.safetensors", "README.md"}
    config = read_json(tiny_model / "config.json")
    state = load_file(str(tiny_model / "bridge.safetensors"))
    assert config["trainable_parameters"] == sum(item.numel() for item in state.values())
    assert config["encoder"]["licence"] == config["language"]["licence"] == "MIT"
    assert NOTICE in (tiny_model / "README.md").read_text() and config["notice"] == NOTICE


def test_a_path_bytes_and_a_picture_are_the_same_image(tiny: Tiny, tiny_model: Path) -> None:
    model, path = load(tiny_model), tiny.image()
    forms = [path, str(path), path.read_bytes(), Image.open(path), np.array(Image.open(path))]
    features = [model.encode(form) for form in forms]
    assert all(torch.equal(found, features[0]) for found in features)
    assert len({model.ask(form, QUESTION).text for form in forms}) == 1


def test_streamed_pieces_join_to_the_answer(tiny: Tiny, tiny_model: Path) -> None:
    model = load(tiny_model)
    features = model.encode(tiny.image())
    for question in QUESTIONS:
        joined = "".join(model.stream(features, [], question)).strip()
        assert joined == model.ask(tiny.image(), question).text


def test_threads_that_load_at_once_share_one_language_model(tiny: Tiny, tiny_model: Path) -> None:
    expected = answers(load(tiny_model), tiny)
    _language_weights.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(load, [tiny_model] * 4))
        assert len({id(model.language.model) for model in models}) == 1  # type: ignore[attr-defined]
        assert list(pool.map(lambda model: answers(model, tiny), models)) == [expected] * 4
    _language_weights.cache_clear()  # what is loaded next is not what was poisoned
    assert answers(load(tiny_model), tiny) == expected


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_between_two_pieces_the_caller_computes_as_before(
    tiny: Tiny, tiny_model: Path, precision: str
) -> None:
    model = load(tiny_model, device="cpu", precision=precision)
    features = model.encode(tiny.image())
    wanted = [list(model.stream(features, [], question)) for question in QUESTIONS]
    streams = [model.stream(features, [], question) for question in QUESTIONS]
    found = [[next(stream)] for stream in streams]
    assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    for pieces, stream in zip(found, streams, strict=True):  # left in the order of their beginning
        pieces += stream
    assert found == wanted
    assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()


def test_loading_and_asking_draw_no_random_number(tiny: Tiny, tiny_model: Path) -> None:
    sampled = GenerationSettings(max_tokens=4, temperature=1.0)
    beams = GenerationSettings(max_tokens=4, num_beams=2)
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        model = load(tiny_model)
        for settings in (None, sampled, beams):
            model.ask(tiny.image(), QUESTION, settings=settings)
        model.rank(tiny.image(), QUESTION, ["liver", "colon"])
        "".join(model.stream(model.encode(tiny.image()), [], QUESTION, settings=sampled))
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("no config", "is not a model folder"),
        ("config is not JSON", "is not JSON"),
        ("other format", "is a model folder of format 99"),
        ("a list", "is a model folder of format None"),
        ("no recipe", "lacks 'recipe'"),
        ("unknown recipe key", "its recipe: unknown key 'tune.magic'"),
        ("no bridge", "no file"),
        ("bytes changed", "is damaged: its SHA-256"),
        ("torn without hash", "is not a whole safetensors file"),
        ("tensor missing", "does not fit: missing ['vision_norm.weight']"),
        ("tensor extra", "not expected ['surprise']"),
        ("tensor of another shape", "the recipe wants"),
        ("another encoder", "was trained on encoder revision"),
        ("language model gone", "no file /nowhere/llama"),
    ],
)
def test_a_damaged_folder_is_one_line(folder: Path, damage: str, words: str) -> None:
    bridge, path = folder / "bridge.safetensors", folder / "config.json"
    config = read_json(path)
    state = load_file(str(bridge))
    if damage == "no config":
        path.unlink()
    elif damage == "config is not JSON":
        path.write_text("{")
    elif damage == "other format":
        write_json(path, {**config, "format": 99})
    elif damage == "a list":
        write_json(path, [config])
    elif damage == "no recipe":
        del config["recipe"]
        write_json(path, config)
    elif damage == "unknown recipe key":
        config["recipe"]["tune"]["magic"] = 1
        write_json(path, config)
    elif damage == "no bridge":
        bridge.unlink()
    elif damage == "bytes changed":
        content = bytearray(bridge.read_bytes())
        content[-1] ^= 1
        bridge.write_bytes(content)
    elif damage == "torn without hash":
        bridge.write_bytes(bridge.read_bytes()[:-100])
        write_json(path, {**config, "bridge_sha256": None})
    elif damage == "another encoder":
        config["encoder"]["revision"] = "0" * 16
        write_json(path, config)
    elif damage == "language model gone":
        config["recipe"]["language"]["weights"] = "/nowhere/llama"
        write_json(path, config)
    else:
        weight = state.pop("vision_norm.weight")
        if damage == "tensor extra":
            state |= {"vision_norm.weight": weight, "surprise": weight.clone()}
        elif damage == "tensor of another shape":
            state["vision_norm.weight"] = weight[:5].clone()
        save_file(state, str(bridge))
        write_json(path, {**config, "bridge_sha256": sha256_file(bridge)})
    with pytest.raises(CloverError) as error:
        load(folder)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_interrupted_save_leaves_no_folder_that_loads(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clover.model.save_file", full)
    with pytest.raises(CloverError, match="No space left"):
        tiny_clover(tiny.recipe).save(tmp_path / "model")
    with pytest.raises(CloverError, match="is not a model folder"):
        load(tmp_path / "model")
    assert not any((tmp_path / "model").iterdir())


def test_an_image_that_is_none_and_an_empty_question_are_one_line(
    tiny_model: Path, tiny: Tiny
) -> None:
    with pytest.raises(CloverError, match="the image cannot be read"):
        open_image(b"not an image")
    with pytest.raises(CloverError, match="cannot be read as an image"):
        open_image(tiny.folder)
    with pytest.raises(CloverError, match="the question is empty"):
        load(tiny_model).ask(tiny.image(), " ")


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (None, "the image is a NoneType; give a path"),
        (torch.zeros(3, 8, 8), "the image is a Tensor"),
        (np.zeros((8, 8, 3)), r"a float64 array \[8, 8, 3\]; give uint8 \[height, width, 3\]"),
        (np.zeros((8, 8), np.uint8), r"a uint8 array \[8, 8\]"),
        (np.zeros((0, 8, 3), np.uint8), r"a uint8 array \[0, 8, 3\]"),
    ],
)
def test_what_cannot_be_an_image_is_one_line(tiny_model: Path, image: Any, words: str) -> None:
    model = load(tiny_model)
    for use in (open_image, model.encode, lambda given: model.ask(given, QUESTION)):
        with pytest.raises(CloverError, match=words):
            use(image)


def test_arguments_of_another_kind_are_one_line(tiny: Tiny, tiny_model: Path) -> None:
    model: Any = load(tiny_model)
    image = tiny.image()
    features = model.encode(image)
    for wrong, words in ((None, "NoneType"), (["what ?"], "list"), (3, "int")):
        for use in (model.ask, lambda image, text: model.rank(image, text, ["liver"])):
            with pytest.raises(CloverError, match=f"the question is a {words}; give text"):
                use(image, wrong)
        with pytest.raises(CloverError, match=f"the question is a {words}; give text"):
            model.stream(features, [], wrong)
    for wrong in (str(image), None):
        with pytest.raises(CloverError, match=r"features is a .*model\.encode\(image\)"):
            model.stream(wrong, [], QUESTION)
    with pytest.raises(CloverError, match=r"image's tokens are \[1, P, 24\]"):
        model.stream(features[0], [], QUESTION)
    with pytest.raises(CloverError, match=r"one text, 'liver'; give a list: \['liver'\]"):
        model.rank(image, QUESTION, "liver")
    for candidates in ([], None, [3]):
        with pytest.raises(CloverError, match=r"candidates is .*; give a list of texts"):
            model.rank(image, QUESTION, candidates)
    with pytest.raises(CloverError, match="no precision 'float23'; known: auto, float32"):
        load(tiny_model, precision="float23")
    with pytest.raises(CloverError, match=r"a Bridge is not called itself.*visual_prefix"):
        model.bridge(features)
    with pytest.raises(CloverError, match=r"a QFormer is not called itself.*encode_queries"):
        model.bridge.qformer(features)


def test_a_recipe_without_a_tokenizer_says_so(tiny: Tiny) -> None:
    recipe = tiny_recipe(tiny.folder, qformer={"tokenizer": None})
    with pytest.raises(CloverError, match=r"qformer\.tokenizer names no tokenizer"):
        tiny_clover(recipe)


def test_config_is_plain_json_that_other_programs_read(tiny_model: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text(encoding="utf-8"))
    assert {"format", "name", "recipe", "encoder", "language", "bridge_sha256"} <= set(config)
