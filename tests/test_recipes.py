"""Every recipe that comes with CLOVER is valid, explained and names only pinned assets."""

from __future__ import annotations

from pathlib import Path

import pytest

from clover.core.assets import parse
from clover.core.config import RECIPES, Recipe, load_recipe

ALL = sorted(RECIPES.rglob("*.yaml"))


def test_the_recipes_are_found() -> None:
    assert [path.stem for path in ALL] == ["histology", "phantom"]


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_recipe_loads_and_pins_what_it_names(path: Path) -> None:
    recipe = load_recipe(path)
    for reference in (recipe.encoder.weights, recipe.qformer.weights, recipe.language.weights):
        asset = parse(str(reference))
        assert asset.version and asset.sha256, f"{reference} is not pinned"


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
