"""Every recipe that comes with CLOVER is valid, explained and names only pinned assets."""

from __future__ import annotations

from pathlib import Path

import pytest

from clover.align.run import align
from clover.core.assets import parse
from clover.core.config import RECIPES, Recipe, load_recipe
from clover.model import load
from clover.serve.fetch import asset_references
from clover.tune.run import tune
from tiny import Tiny, write_llama

ALL = sorted(RECIPES.rglob("*.yaml"))


def test_the_recipes_are_found() -> None:
    names = ["clover-flant5xl", "clover-vicuna7b", "histology", "modern", "phantom"]
    assert [path.stem for path in ALL] == names


WHEELS = [path for path in ALL if path.stem in ("histology", "phantom")]
FULL = [path for path in ALL if path not in WHEELS]


@pytest.mark.parametrize("path", WHEELS, ids=lambda path: path.stem)
def test_recipe_loads_and_pins_what_it_names(path: Path) -> None:
    recipe = load_recipe(path)
    for reference in (recipe.encoder.weights, recipe.qformer.weights, recipe.language.weights):
        asset = parse(str(reference))
        assert asset.version and asset.sha256, f"{reference} is not pinned"


@pytest.mark.parametrize("path", FULL, ids=lambda path: path.stem)
def test_a_full_size_recipe_names_a_place_or_a_revision_for_every_file(path: Path) -> None:
    references = asset_references(load_recipe(path))
    # `modern` takes the encoder's weights from the register.
    assert set(references) == {
        "encoder.weights",
        "qformer.weights",
        "qformer.tokenizer",
        "language.weights",
    }
    for field, reference in references.items():
        asset = parse(reference)
        is_register = field == "encoder.weights" and path.stem == "modern"
        assert asset.kind == "path" or asset.version or is_register, reference


@pytest.mark.parametrize("path", FULL, ids=lambda path: path.stem)
def test_its_tiny_twin_trains_two_steps_of_both_stages_and_answers(
    path: Path, tiny: Tiny, tmp_path: Path
) -> None:
    recipe = load_recipe(path)
    language = write_language(tmp_path / "language", recipe)
    small = tiny.recipe
    steps = {"steps": 2, "batch_size": 4, "warmup_steps": 1}
    twin = recipe.model_copy(
        update={
            "precision": "float32",
            "encoder": recipe.encoder.model_copy(
                update={
                    "kind": "eva_clip",
                    "model": "vit_tiny_14",
                    "weights": None,
                    "image_size": 56,
                }
            ),
            "qformer": small.qformer,
            "language": recipe.language.model_copy(update={"weights": str(language)}),
            "align": recipe.align.model_copy(update=steps),
            "tune": recipe.tune.model_copy(update=steps),
            "evaluate": recipe.evaluate.model_copy(update={"min_tokens": 1, "max_tokens": 4}),
        }
    )
    shared = {"cache": tmp_path / "features"}
    aligned = align(twin, captions=tiny.captions, out=tmp_path / "run", **shared)
    tuned = tune(
        twin,
        instructions=tiny.instructions,
        out=tmp_path / "model",
        run=tmp_path / "run",
        start=aligned.weights,
        **shared,
    )
    assert aligned.is_finished and tuned.is_finished
    answer = load(tmp_path / "model").ask(tiny.image(), "which tissue is shown ?")
    assert isinstance(answer.text, str) and answer.notice


def write_language(folder: Path, recipe: Recipe) -> Path:
    """Write a tiny language model of the recipe's kind, whose tokenizer knows its tokens."""
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    write_llama(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["</s>", "<|im_start|>", "<|im_end|>"]})
    if recipe.language.kind == "decoder_only":
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(len(tokenizer))
    else:
        config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=2)
        config.update({"num_heads": 4, "decoder_start_token_id": 0, "eos_token_id": 1})
        model = T5ForConditionalGeneration(config)
        (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_resolved_recipe_reads_back_to_itself(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    copy = tmp_path / "resolved.yaml"
    copy.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(copy) == recipe


def test_every_field_of_a_recipe_is_explained() -> None:
    def unexplained(schema: dict, where: str = "") -> list[str]:
        found = []
        for name, field in schema.get("properties", {}).items():
            if "description" not in field:
                found.append(f"{where}{name}")
        for name, part in schema.get("$defs", {}).items():
            found += unexplained(part, f"{name}.")
        return found

    assert unexplained(Recipe.model_json_schema()) == []
