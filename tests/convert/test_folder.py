"""A converted checkpoint is a model: it opens, answers as transformers does, and may be moved."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from click.testing import CliRunner, Result
from PIL import Image

import clover
from clover.cli import cli
from clover.convert.run import convert as run_convert
from clover.core.config import Recipe
from clover.core.errors import CloverError
from clover.core.tensors import open_tensors
from clover.language.protocol import GenerationSettings
from clover.vision.cache import FeatureCache
from tiny import Tiny, tiny_clover, write_llama, write_tokenizer

from .theirs import KINDS, QUERIES, WORDS, build

QUESTION = "is there some necrosis ?"
STAGE_2 = [kind for kind in KINDS if kind != "retrieval"]
SPECIAL = {
    # pad, start, end, by their places in the families' own vocabularies.
    "llama": ["<pad>", "<s>", "</s>", "<unk>"],
    "opt": ["<unused>", "<pad>", "</s>", "<unk>"],
    "t5": ["<pad>", "</s>", "<unk>", "<unused>"],
}


def write_language_tokenizer(kind: str, folder: Path) -> None:
    """Write a word tokenizer that puts its family's special tokens around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL[kind], *QUESTION.split()]
    words += [f"word{index}" for index in range(WORDS - 1 - len(words))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    first = {"llama": "<s>", "opt": "</s>"}.get(kind)
    single = f"{first} $A" if first else "$A </s>"
    mark = first or "</s>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(mark, words.index(mark))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="</s>",
        bos_token=first,
    )
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Return transformers' folders as their own classes and processors save them."""
    top, made = tmp_path_factory.mktemp("theirs"), {}
    for kind in KINDS:
        folder = top / kind
        model = build(kind, folder)
        (folder / "qformer_tokenizer").mkdir()
        fill = [f"w{index}" for index in range(199 - 1 - 5 - 2 * 26)]
        write_tokenizer(folder / "qformer_tokenizer" / "tokenizer.json", fill)
        if kind != "retrieval":
            write_language_tokenizer(kind.partition("-")[2], folder)
        made[kind] = (folder, model)
    return made


def picture(seed: int) -> Image.Image:
    # Coarse, or every patch would be about the same grey.
    pixels = np.random.default_rng(seed).choice([0, 255], (5, 4, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize((61, 47), Image.Resampling.NEAREST)


def expected(model: Any, folder: Path, image: Image.Image, encoder: Any) -> str:
    """Return transformers' greedy answer: image places, then the tokenizer's own ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = tokenizer(QUESTION)["input_ids"]
    inputs = {
        "pixel_values": encoder.prepare(image)[None],
        "input_ids": torch.tensor([[WORDS - 1] * QUERIES + ids]),
    }
    if model.config.model_type == "instructblip":
        questions = clover.qformer.tokenizer.TextTokenizer(
            folder / "qformer_tokenizer" / "tokenizer.json"
        )([QUESTION], limit=64)
        inputs |= {"qformer_input_ids": questions.ids, "qformer_attention_mask": questions.mask}
    row = model.generate(**inputs, do_sample=False, max_new_tokens=9)[0].tolist()
    if not model.config.text_config.is_encoder_decoder:
        assert row[: QUERIES + len(ids)] == inputs["input_ids"][0].tolist()
        row = row[QUERIES + len(ids) :]
    return str(tokenizer.decode(row, skip_special_tokens=True)).strip()


def convert(source: Path, target: Path, *more: str) -> Result:
    arguments = ["convert", str(source), str(target), "--to", "clover", *more]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    return done


def check_answers(theirs: tuple[Path, Any], target: Path) -> clover.Clover:
    folder, model = theirs
    ours = clover.load(target, device="cpu", precision="float32")
    wanted = expected(model, folder, picture(1), ours.encoder)
    found = ours.ask(picture(1), QUESTION, settings=GenerationSettings(max_tokens=9)).text
    assert found == wanted and len(found.split()) > 1
    # Random weights say about the same of every image; what they see of it is not the same.
    with torch.no_grad():
        seen = [ours.visual_prefix(ours.encode(picture(seed)), [QUESTION]) for seed in (1, 2)]
    assert (seen[0] - seen[1]).abs().max() > 1e-3
    return ours


@pytest.mark.parametrize("kind", STAGE_2)
def test_transformers_folder_answers_as_transformers_does_and_may_be_moved(
    theirs: dict[str, tuple[Path, Any]], tmp_path: Path, kind: str
) -> None:
    done = convert(theirs[kind][0], tmp_path / "made")
    assert f"a model: clover ask {tmp_path / 'made'}" in done.output
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["recipe"]["encoder"]["weights"] == "beside:encoder.safetensors"
    assert config["recipe"]["language"]["weights"] == "beside:language"
    shutil.move(tmp_path / "made", tmp_path / "moved")
    ours = check_answers(theirs[kind], tmp_path / "moved")
    assert ours.bridge.num_trainable() == config["trainable_parameters"]
    assert ours.language.hidden_size == config["language"]["width"] == 40


@pytest.mark.parametrize("kind", STAGE_2)
@pytest.mark.parametrize("form", ["lavis", "published"])
def test_lavis_and_published_files_answer_with_a_recipes_frozen_parts(
    theirs: dict[str, tuple[Path, Any]], tmp_path: Path, kind: str, form: str
) -> None:
    source, target = theirs[kind][0], tmp_path / "made"
    whole = convert_to_lavis(source, tmp_path / "whole.pth")
    parts = ("t5_model.", "llm_model.", "opt_model.")
    # LAVIS's stage 2 files carry what learnt; the published CLOVER's the image encoder as well.
    if form == "lavis":
        state = {n: t for n, t in whole.items() if not n.startswith((*parts, "visual_encoder."))}
        torch.save(
            {n: t for n, t in whole.items() if n.startswith("visual_")}, tmp_path / "eva.pth"
        )
    else:
        state = {f"module.{n}": t for n, t in whole.items() if not n.startswith(parts)}
    torch.save({"model": state, "epoch": 2}, tmp_path / "stage2.pth")
    # The language model by itself, as its own class saves it.
    theirs[kind][1].language_model.save_pretrained(tmp_path / "language")
    write_language_tokenizer(kind.partition("-")[2], tmp_path / "language")
    recipe = {
        "name": "twin",
        "encoder": {"kind": "eva_clip", "model": "vit_tiny_14", "image_size": 56},
        "qformer": {"tokenizer": str(source / "qformer_tokenizer" / "tokenizer.json")},
        "language": {"weights": str(tmp_path / "language"), "licence": "MIT"},
    }
    if form == "lavis":
        recipe["encoder"]["weights"] = str(tmp_path / "eva.pth")  # type: ignore[index]
    if kind.endswith("t5"):
        recipe["language"]["kind"] = "encoder_decoder"  # type: ignore[index]
    else:
        first = {"llama": "<s>", "opt": "</s>"}[kind.partition("-")[2]]
        recipe["language"]["text_start"] = first  # type: ignore[index]
    (tmp_path / "twin.yaml").write_text(yaml.safe_dump(recipe))
    convert(tmp_path / "stage2.pth", target, "--recipe", f"{tmp_path}/twin.yaml", "--heads", "4")
    assert (target / "encoder.safetensors").exists() == (form == "published")
    assert not (target / "language").exists()
    # Nothing says so but the text's weights, which LAVIS drops where they are not read.
    said = json.loads((target / "config.json").read_text())["recipe"]["tune"]
    assert said["instruction_aware"] == kind.startswith("instruct")
    ours = check_answers(theirs[kind], target)
    assert "MIT" in (target / "README.md").read_text()
    assert ours.recipe.language.weights == str(tmp_path / "language")


def convert_to_lavis(source: Path, target: Path) -> dict[str, torch.Tensor]:
    from clover.convert.run import convert as run

    run(source, target, to="lavis", has_check=False)
    return dict(open_tensors(target))


def write_trained_part(source: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Write `stage2.pth`, without encoder and language model; return all tensors of the source."""
    whole = convert_to_lavis(source, folder / "whole.pth")
    kept = {n: t for n, t in whole.items() if not n.startswith(("llm_model.", "visual_encoder."))}
    torch.save({"model": kept}, folder / "stage2.pth")
    return whole


def test_what_is_missing_is_named_and_nothing_claims_to_be_a_model(
    theirs: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    write_trained_part(theirs["instructblip-llama"][0], tmp_path)
    done = convert(tmp_path / "stage2.pth", tmp_path / "out", "--heads", "4")
    for line in ("encoder.weights: --encoder", "language.weights: --l", "qformer.tokenizer: --t"):
        assert f"not yet a model: it lacks {line}" in done.output
    assert not (tmp_path / "out" / "config.json").exists()
    # A folder that was a model stays one where nothing could be written into it.
    (tmp_path / "out" / "config.json").write_text("{}")
    typo = ["convert", tmp_path / "stage2.pth", tmp_path / "out", "--to", "clover", "--heads", "4"]
    failed = CliRunner().invoke(cli, [*map(str, typo), "--tokenizer", str(tmp_path / "typo.json")])
    assert failed.exit_code != 0 and (tmp_path / "out" / "config.json").exists()
    done = convert(theirs["retrieval"][0], tmp_path / "one")
    assert "it lacks stage 2: this is a stage 1 checkpoint" in done.output
    assert not (tmp_path / "one" / "config.json").exists()


def test_options_bring_the_parts_one_by_one(
    theirs: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    kind = "instructblip-llama"
    source, model = theirs[kind]
    whole = write_trained_part(source, tmp_path)
    torch.save({n: t for n, t in whole.items() if n.startswith("visual_")}, tmp_path / "eva.pth")
    model.language_model.save_pretrained(tmp_path / "language")
    write_language_tokenizer("llama", tmp_path / "language")
    parts = ["--encoder", tmp_path / "eva.pth", "--language", tmp_path / "language"]
    parts += ["--tokenizer", source / "qformer_tokenizer" / "tokenizer.json", "--heads", "4"]
    convert(tmp_path / "stage2.pth", tmp_path / "out", *map(str, parts))
    check_answers(theirs[kind], tmp_path / "out")


def test_evas_own_file_has_a_block_and_a_head_more_which_are_left_out(
    theirs: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    source, model = theirs["instructblip-llama"]
    whole = write_trained_part(source, tmp_path)
    start = "visual_encoder."
    eva = {n.removeprefix(start): t for n, t in whole.items() if n.startswith(start)}
    eva |= {n.replace("blocks.2.", "blocks.3."): t + 1 for n, t in eva.items() if "blocks.2." in n}
    torch.save(eva | {"norm.weight": torch.ones(48), "head.bias": torch.ones(9)}, tmp_path / "eva")
    model.language_model.save_pretrained(tmp_path / "language")
    write_language_tokenizer("llama", tmp_path / "language")
    parts = ["--encoder", tmp_path / "eva", "--language", tmp_path / "language", "--heads", "4"]
    parts += ["--tokenizer", source / "qformer_tokenizer" / "tokenizer.json"]
    done = convert(tmp_path / "stage2.pth", tmp_path / "out", *map(str, parts))
    assert "runs 3 blocks and drops the last" in done.output
    note = json.loads((tmp_path / "out" / "convert.json").read_text())["left_out"]
    assert "head.bias" in note and "blocks.3.mlp.fc1.weight" in note
    check_answers(theirs["instructblip-llama"], tmp_path / "out")


def test_a_recipe_with_another_language_model_or_encoder_is_one_line(
    theirs: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    write_trained_part(theirs["instructblip-llama"][0], tmp_path)
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide" / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    tree = {
        "name": "other",
        "encoder": {"kind": "eva_clip", "model": "vit_tiny_14", "weights": "x", "image_size": 56},
        "qformer": {"tokenizer": "t.json"},
        "language": {"weights": str(tmp_path / "wide")},
    }
    words = {
        "language": "was trained for a language model 40 wide",
        "encoder": "reads image tokens 48 wide, and those of eva_clip/vit_g_14 are 1408",
    }
    for part, line in words.items():
        if part == "encoder":
            tree["encoder"] = {"kind": "eva_clip", "model": "vit_g_14", "weights": "x"}
        (tmp_path / "other.yaml").write_text(yaml.safe_dump(tree))
        files = tmp_path / "stage2.pth", tmp_path / "out"
        more = ["--to", "clover", "--heads", "4", "--recipe", tmp_path / "other.yaml"]
        done = subprocess.run(
            [sys.executable, "-m", "clover.cli", "convert", *files, *more],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2 and line in done.stderr and done.stderr.count("\n") == 1
        assert not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(CloverError, match="it holds no config"):
        clover.load(tmp_path / "out")


def test_another_checkpoint_in_the_same_folder_is_another_encoder_and_model(
    theirs: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    source, target = theirs["instructblip-llama"][0], tmp_path / "made"
    other = tmp_path / "other"
    build("instructblip-llama", other, seed=1)
    shutil.copytree(source / "qformer_tokenizer", other / "qformer_tokenizer")
    write_language_tokenizer("llama", other)
    convert(source, target)
    first = clover.load(target, device="cpu", precision="float32")
    cache = FeatureCache(tmp_path / "features", first.encoder)
    digest = "ab" * 32
    picture(1).save(tmp_path / "a.png")
    cache.fill({digest: tmp_path / "a.png"})
    assert digest in cache
    convert(other, target)
    # Beside the first, which is still in memory, and in a process that has loaded it before.
    second = clover.load(target, device="cpu", precision="float32", beside=first)
    assert second.encoder.revision != first.encoder.revision
    assert digest not in FeatureCache(tmp_path / "features", second.encoder)
    fresh = expected(theirs_model(other), other, picture(1), second.encoder)
    asked = second.ask(picture(1), QUESTION, settings=GenerationSettings(max_tokens=9)).text
    assert asked == fresh


def theirs_model(folder: Path) -> Any:
    from transformers import InstructBlipForConditionalGeneration

    return InstructBlipForConditionalGeneration.from_pretrained(folder).eval()


def test_an_encoder_that_was_replaced_is_refused_and_one_that_moved_is_not(
    theirs: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    convert(theirs["instructblip-llama"][0], tmp_path / "made")
    shutil.copytree(tmp_path / "made", tmp_path / "moved")
    revision = clover.load(tmp_path / "made", device="cpu").encoder.revision
    assert clover.load(tmp_path / "moved", device="cpu").encoder.revision == revision
    weights = tmp_path / "moved" / "encoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x80\x3f")
    with pytest.raises(CloverError, match=f"was trained on encoder revision {revision}"):
        clover.load(tmp_path / "moved", device="cpu")


def test_a_converted_model_that_is_saved_again_still_says_where_it_came_from(
    theirs: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    convert(theirs["instructblip-llama"][0], tmp_path / "made")
    card = (tmp_path / "made" / "README.md").read_text()
    assert "image encoder, frozen |" in card and "not in this folder" not in card
    clover.load(tmp_path / "made", device="cpu").save(tmp_path / "again")
    said = json.loads((tmp_path / "again" / "config.json").read_text())
    assert said["converted_from"] == "instructblip-llama"
    assert (
        "image encoder, frozen, not in this folder |"
        in (tmp_path / "again" / "README.md").read_text()
    )
    assert clover.load(tmp_path / "again", device="cpu").details["converted_from"]


def saved(tiny: Tiny, folder: Path, **encoder: Any) -> tuple[Path, Path]:
    """Save a model of CLOVER's own and its recipe; return both."""
    tree = tiny.recipe.model_dump(mode="json")
    tree["encoder"] |= encoder
    tree["evaluate"] |= {"num_beams": 3}
    tree["qformer"] |= {"layer_norm_eps": 1e-6}
    recipe = Recipe.model_validate(tree)
    tiny_clover(recipe).save(folder / "model")
    (folder / "own.yaml").write_text(recipe.to_yaml())
    return folder / "model", folder / "own.yaml"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("way", ["itself", "its folder", "a folder in it", "a file of it"])
def test_a_target_that_would_replace_what_is_read_is_refused(
    tiny: Tiny, tmp_path: Path, way: str
) -> None:
    model, _ = saved(tiny, tmp_path / "made")
    before = contents(tmp_path / "made")
    source = model / "bridge.safetensors" if way == "a file of it" else model
    target = {"its folder": model.parent, "a folder in it": model / "more"}.get(way, model)
    (tmp_path / "link").symlink_to(target)
    for name in (target, tmp_path / "link"):
        with pytest.raises(CloverError, match="name another TARGET"):
            run_convert(source, name, to="clover")
    assert contents(tmp_path / "made") == before


def test_what_would_be_no_model_does_not_replace_one(
    theirs: dict[str, tuple[Path, Any]], tiny: Tiny, tmp_path: Path
) -> None:
    model, _ = saved(tiny, tmp_path / "made")
    before = contents(model)
    write_trained_part(theirs["instructblip-llama"][0], tmp_path)
    with pytest.raises(CloverError, match=r"holds a model.*lacks encoder\.weights: --encoder"):
        run_convert(tmp_path / "stage2.pth", model, to="clover", num_heads=4)
    assert contents(model) == before


@pytest.mark.parametrize("kind", ["tiny", "timm"])
def test_a_model_of_our_own_goes_to_lavis_and_comes_back_with_its_recipe(
    tiny: Tiny, tmp_path: Path, kind: str
) -> None:
    more: dict[str, Any] = {}
    if kind == "timm":
        network = timm.create_model("tf_efficientnet_lite0", features_only=True)
        torch.save(network.state_dict(), tmp_path / "lite.pth")
        more = {"kind": "timm", "weights": str(tmp_path / "lite.pth"), "levels": [2], "grid": 2}
    model, recipe = saved(tiny, tmp_path, **more)
    run_convert(model, tmp_path / "there.pth", to="lavis")
    convert(tmp_path / "there.pth", tmp_path / "back", "--recipe", str(recipe))
    convert(model, tmp_path / "copy")
    first = clover.load(model)
    for name in ("back", "copy"):
        again = clover.load(tmp_path / name)
        assert again.encoder.revision == first.encoder.revision
        wanted, found = (item.recipe.model_dump() for item in (first, again))
        wanted["name"] = name
        wanted["qformer"] |= {"vocab_size": first.tokenizer.vocab_size}
        wanted["qformer"] |= {"encoder_width": first.encoder.width}
        assert found == wanted
        assert again.ask(picture(1), QUESTION).text == first.ask(picture(1), QUESTION).text


def test_options_that_cannot_be_are_refused_before_anything_is_written(
    theirs: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    source = theirs["instructblip-llama"][0]
    for heads in (-4, 0, 5):
        with pytest.raises(CloverError, match=f"--heads {heads} does not divide"):
            run_convert(source, tmp_path / "out", to="clover", num_heads=heads)
    with pytest.raises(CloverError, match=r"--tokenizer .*nothere: no such file"):
        run_convert(source, tmp_path / "out", to="clover", tokenizer=tmp_path / "nothere")
    (tmp_path / "odd.yaml").write_text("name: odd\nencoder: {kind: clip, model: vit_x, weights: x}")
    write_trained_part(source, tmp_path)
    with pytest.raises(CloverError, match="clip knows no 'vit_x'"):
        run_convert(
            tmp_path / "stage2.pth",
            tmp_path / "out",
            to="clover",
            num_heads=4,
            recipe=str(tmp_path / "odd.yaml"),
            language=write_llama(tmp_path / "llama"),
            tokenizer=source / "qformer_tokenizer" / "tokenizer.json",
        )
    assert not (tmp_path / "out").exists()
