"""Recipes: closed to unknown keys, checked, and changed from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from clover.core.config import RECIPES, Recipe, load_recipe, lock_of
from clover.core.errors import CloverError
from clover.core.files import fingerprint


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ntune:\n  steps: 7\n")
    return path


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_survives_its_own_yaml(path: Path) -> None:
    recipe = load_recipe(path.stem)
    assert Recipe.model_validate(yaml.safe_load(recipe.to_yaml())) == recipe
    assert load_recipe(path) == recipe


def test_there_are_recipes() -> None:
    assert {"phantom", "histology"} <= {path.stem for path in RECIPES.glob("*.yaml")}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("tune:\n  stepss: 3", "unknown key 'tune.stepss'; did you mean 'steps'?"),
        ("tunne: {}", "unknown key 'tunne'; did you mean 'tune'?"),
        ("qformer:\n  num_query: 3", "did you mean 'num_queries'?"),
        ("tune:\n  steps: 0", "tune.steps"),
        ("tune:\n  learning_rate: -1", "tune.learning_rate"),
        ("precision: half", "precision"),
        ("qformer:\n  dropout: 1.5", "(found 1.5)"),
        ("encoder:\n  kind: cnn", "encoder.kind"),
        ("seed: -1", "seed: input should be greater than or equal to 0 (found -1)"),
        ("seed: 9223372036854775808", "seed: input should be less than 9223372036854775808"),
        ("align:\n  seed: -1", "align.seed"),
        ("phantom:\n  seed: -1", "phantom.seed"),
        ("qformer:\n  num_heads: 5", "num_heads 5 does not divide hidden_size 768; 4 does"),
        ("qformer:\n  num_heads: 0", "qformer.num_heads"),
        ("qformer:\n  hidden_size: 0", "qformer.hidden_size"),
        ("qformer:\n  num_layers: 0", "qformer.num_layers: input should be greater than or equal"),
        ("qformer:\n  intermediate_size: 0", "qformer.intermediate_size"),
        ("qformer:\n  embedding_size: -4", "qformer.embedding_size"),
        ("qformer:\n  max_positions: 2", "qformer.max_positions"),
        ("qformer:\n  initializer_range: -0.1", "qformer.initializer_range"),
        ("qformer:\n  layer_norm_eps: -1", "qformer.layer_norm_eps"),
        ("align:\n  losses: []", "align.losses: no loss is named; name one or more of contrast"),
        ("align:\n  losses: [match, match]", "align.losses: match is named 2 times; name it once"),
        ("align:\n  betas: [2, 3]", "align.betas.0: input should be less than 1 (found 2)"),
        ("align:\n  betas: [0.9, -1]", "align.betas.1"),
        ("tune:\n  clip_norm: 0", "tune.clip_norm: input should be greater than 0 (found 0)"),
        ("tune:\n  learning_rate: .inf", "tune.learning_rate: input should be a finite number"),
        ("tune:\n  weight_decay: .nan", "tune.weight_decay"),
        ("encoder:\n  std: [1, 0, 1]", "encoder.std.1: input should be greater than 0 (found 0)"),
        ("encoder:\n  microns_per_pixel: 0", "encoder.microns_per_pixel"),
        ("encoder:\n  grid: 300", "grid 300 has more tokens a side than image_size 224 pixels"),
    ],
)
def test_a_wrong_key_or_value_is_one_line_that_names_it(
    tmp_path: Path, content: str, words: str
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"name: r\n{content}\n")
    with pytest.raises(CloverError) as error:
        load_recipe(path)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [", "", "\x00"])
def test_what_is_no_recipe_is_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(content)
    with pytest.raises(CloverError) as error:
        load_recipe(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_settings_change_values_and_the_last_one_counts(recipe: Path) -> None:
    found = load_recipe(
        recipe,
        ("tune.steps=9", "tune.steps=11", "align.learning_rate=1e-4", "encoder.levels=[2, 3]",
         "phantom.images=16", "tune.clip_norm=null", "seed=3"),
    )  # fmt: skip
    assert (found.tune.steps, found.align.learning_rate, found.seed) == (11, 1e-4, 3)
    assert found.encoder.levels == (2, 3) and found.tune.clip_norm is None
    assert found.phantom is not None and found.phantom.images == 16


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("tune.step=9", "did you mean 'steps'?"),
        ("tune.steps", "section.key=value"),
        ("=9", "section.key=value"),
        ("tune.steps.more=9", "steps is a value, not a section"),
        ("tune.steps=[", "is not a YAML value"),
        ("tune.steps=many", "tune.steps"),
    ],
)
def test_a_wrong_setting_is_one_line(recipe: Path, setting: str, words: str) -> None:
    with pytest.raises(CloverError) as error:
        load_recipe(recipe, (setting,))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_folder_named_like_a_shipped_recipe_does_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `clover phantom phantom` makes such a folder.
    (tmp_path / "phantom").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe("phantom").phantom is not None


def test_the_fingerprint_changes_with_its_sections_and_no_others(recipe: Path) -> None:
    before = load_recipe(recipe)
    after = load_recipe(recipe, ("tune.steps=8",))
    assert before.fingerprint("align", "qformer") == after.fingerprint("align", "qformer")
    assert before.fingerprint("tune") != after.fingerprint("tune")


def test_every_recipe_field_explains_itself() -> None:
    def walk(model: type, path: str) -> list[str]:
        silent = []
        for name, field in model.model_fields.items():  # type: ignore[attr-defined]
            if not field.description:
                silent.append(f"{path}{name}")
            if hasattr(field.annotation, "model_fields"):
                silent += walk(field.annotation, f"{path}{name}.")
        return silent

    assert walk(Recipe, "") == []


def test_a_missing_recipe_in_a_folder_is_not_taken_for_the_shipped_one() -> None:
    with pytest.raises(CloverError, match=r"no recipe my/phantom\.yaml"):
        load_recipe("my/phantom.yaml")
    assert load_recipe("recipes/phantom.yaml") == load_recipe("phantom")


def test_a_field_of_a_later_release_changes_no_key_until_it_is_set() -> None:
    recipe = load_recipe("phantom", ("tune.anchoring_repeat=null",))
    # The key as the first release made it, which knew none of these fields.
    tree = recipe.model_dump(mode="json", include={"encoder", "language", "qformer", "tune"})
    for field in (
        "grounding_spelling",
        "grounding_tokens",
        "grounding_channels",
        "grounding_kept",
        "worked_examples",
        "anchoring_repeat",
    ):
        del tree["tune"][field]
    for field in ("train_word_embedding", "checkpoint_activations"):
        del tree["qformer"][field]
    for field in (
        *("checkpoint_every", "checkpoint_keep", "checkpoint_in_background", "cuda_graphs"),
    ):
        del tree["tune"][field]
    for field in ("validate_every", "validate_samples", "keep_weights", "compile"):
        del tree["tune"][field]
    for field in (
        "options",
        "mean",
        "std",
        "numbers",
        "licence_note",
        "storage",
        "views",
        "view_kind",
    ):
        del tree["encoder"][field]
    for field in ("quantise", "paper_dropout", "text_start", "spread"):
        del tree["language"][field]
    assert recipe.fingerprint("encoder", "language", "qformer", "tune") == fingerprint(tree)
    changed = load_recipe("phantom", ("language.quantise=int8", "tune.worked_examples=4"))
    assert changed.fingerprint("tune") != recipe.fingerprint("tune")
    assert changed.fingerprint("language") != recipe.fingerprint("language")
    assert changed.fingerprint("encoder") == recipe.fingerprint("encoder")


def test_a_lock_that_pins_more_exactly_changes_no_key_and_another_reference_does(
    tmp_path: Path,
) -> None:
    path = tmp_path / "own.yaml"
    tree = load_recipe("phantom").model_dump(mode="json", exclude_unset=True)

    def read(reference: str, *settings: str) -> Recipe:
        tree["language"]["weights"] = reference
        path.write_text(yaml.safe_dump(tree))
        return load_recipe(path, settings)

    before = read("hf://lab/words@main")
    pinned = f"hf://lab/words@{'a' * 40}?sha256={'b' * 64}"
    entry = {"reference": "hf://lab/words@main", "pinned": pinned, "files": {}}
    lock_of(path).write_text(json.dumps({"recipe": "own", "fields": {"language.weights": entry}}))
    after = read("hf://lab/words@main")
    assert after.language.weights == pinned
    assert after.fingerprint("language") == before.fingerprint("language")
    assert after.settings("language") == before.settings("language")
    faster = read("hf://lab/words@main", "language.max_answer_tokens=9")
    assert faster.fingerprint("language") != before.fingerprint("language")
    other = read("hf://lab/words@v2")
    assert other.language.weights == "hf://lab/words@v2"
    assert other.fingerprint("language") != before.fingerprint("language")


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        (None, "CLOVER_FAMILIES names, which is not set)"),
        ("gone", "CLOVER_FAMILIES names, gone, and there is no such folder in {cwd})"),
        ("there", "CLOVER_FAMILIES names, there, which has no mine.py)"),
    ],
)
def test_a_family_of_ones_own_that_is_not_found_leads_to_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    monkeypatch.delenv("CLOVER_FAMILIES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CLOVER_FAMILIES", variable)
    (tmp_path / "r.yaml").write_text("name: r\nencoder: {kind: mine}\n")
    with pytest.raises(CloverError) as error:
        load_recipe("r.yaml")
    assert "encoder.kind: no family 'mine'" in str(error.value)
    assert words.format(cwd=tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_texts_are_no_longer_than_the_positions_and_the_runs_key_is_as_given() -> None:
    recipe = load_recipe("phantom", ("qformer.max_positions=24",))
    short = recipe.within_positions()
    assert (short.align.max_text_tokens, short.tune.max_question_tokens) == (24, 24)
    assert recipe.tune.max_question_tokens == 32
    usual = load_recipe("phantom")
    assert usual.within_positions() == usual
