"""What a model folder says of itself: `config.json`, and the card for people.

In: names, hashes and the recipe. Out: the same, read again. The weights beside them are
`clover.model`'s to write and load.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from clover import __version__
from clover.core.assets import parse
from clover.core.config import ASSETS, Recipe, explain_error
from clover.core.errors import CloverError
from clover.core.files import from_here, read_json, sha256_file, write_json, write_text

NOTICE = "Research use only, not for diagnosis."
_FORMAT = 1
_BESIDE = "beside:"
"""Before the name of a frozen part that lies in the model folder itself (`clover convert`)."""
_START = "paths_start"
_NEEDED = tuple(asset for asset in ASSETS if asset != ("qformer", "weights"))
"""What a trained model still reads: not the weights its Q-Former began with."""


def write_config(
    path: Path,
    *,
    name: str,
    recipe: dict[str, Any],
    encoder: dict[str, Any],
    language: dict[str, Any],
    trainable: int,
    details: dict[str, Any],
) -> None:
    """Write the model card and, last, `config.json` of a folder whose bridge is there.

    Args:
        path: The folder.
        name: Shown with every answer.
        recipe: As JSON; what lies in the folder may be named `beside:FILE`.
        encoder: id, revision, width, licence.
        language: id, width, licence.
        trainable: Parameters of the bridge.
        details: Further entries.
    """
    config = {
        "format": _FORMAT,
        "clover": __version__,
        "name": name,
        "recipe": recipe,
        "encoder": encoder,
        "language": language,
        "trainable_parameters": trainable,
        "bridge_sha256": sha256_file(path / "bridge.safetensors"),
        "notice": NOTICE,
        **_started_from(recipe, path),
        **details,
    }
    write_text(path / "README.md", _card(config))
    write_json(path / "config.json", config)


def _card(config: dict[str, Any]) -> str:
    encoder, language = config["encoder"], config["language"]
    places = [config["recipe"][part].get("weights") or "" for part in ("encoder", "language")]
    sees, speaks = ("" if p.startswith(_BESIDE) else ", not in this folder" for p in places)
    note = encoder.get("licence_note")
    said = (
        f"\n**The image encoder's licence {note}. This model was trained on them.**\n"
        if note
        else ""
    )
    return f"""# {config["name"]}: a CLOVER model

**{NOTICE}**

| part | what | licence |
|---|---|---|
| image encoder, frozen{sees} | {encoder["id"]} | {encoder["licence"]} |
| language model, frozen{speaks} | {language["id"]} | {language["licence"]} |
| bridge: trained parameters | {config["trainable_parameters"]:,} | its data's |
{said}
    clover ask FOLDER image.png "Is there necrosis?"
    clover chat FOLDER image.png

`config.json` holds the recipe, the prompt, and the hashes of everything frozen.
"""


def read_config(path: Path) -> dict[str, Any]:
    """Read a model folder's `config.json`.

    Raises:
        CloverError: not a model folder, or one of another version.
    """
    if not (path / "config.json").exists():
        raise CloverError(f"{path} is not a model folder: it holds no config.json")
    config = read_json(path / "config.json")
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        found = config.get("format") if isinstance(config, dict) else None
        raise CloverError(
            f"{path} is a model folder of format {found}, this CLOVER reads {_FORMAT}; "
            "use the CLOVER version named in its config.json"
        )
    lacking = [name for name in ("name", "recipe", "encoder", "language") if name not in config]
    if lacking:
        raise CloverError(f"{path}/config.json lacks '{lacking[0]}': it is not whole")
    if not isinstance(config["recipe"], dict):
        raise CloverError(f"{path}/config.json: its recipe is no section of names and values")
    _place(config["recipe"], path)
    _find(config["recipe"], path, config.get(_START))
    return config


def recipe_of(config: dict[str, Any], path: Path) -> Recipe:
    """Return the recipe in a model folder's `config.json`.

    Args:
        config: From `read_config`.
        path: The folder; for the error.

    Raises:
        CloverError: it is no recipe, or a file it names by its path is not there.
    """
    recipe = named_recipe(config, path)
    for part, field in _NEEDED:
        place = _own_path(getattr(getattr(recipe, part), field))
        if place is not None and not place.exists():
            raise CloverError(
                f"{path}/config.json: {part}.{field}: no file {place}{from_here(place)}; put it "
                f"there, or write the whole path of where it lies under {part}.{field}"
            )
    return recipe


def named_recipe(config: dict[str, Any], path: Path) -> Recipe:
    """Return the same, whether what it names is at hand or not.

    Raises:
        CloverError: it is no recipe.
    """
    try:
        recipe = Recipe.model_validate(config["recipe"])
    except ValidationError as error:
        raise CloverError(explain_error(error, f"{path}/config.json, its recipe")) from error
    return recipe.within_positions()


def _own_path(reference: Any) -> Path | None:
    """Return the path that a reference is; None for what a cache holds, and for none."""
    asset = parse(reference) if isinstance(reference, str) and reference else None
    return asset.path if asset is not None and asset.kind == "path" else None


def _relative(recipe: dict[str, Any]) -> dict[tuple[str, str], Path]:
    """Return (section, field) -> path of what a recipe names from the folder a command runs in."""
    sections = {p: recipe[p] for p, _ in _NEEDED if isinstance(recipe.get(p), dict)}
    places = {(p, f): _own_path(sections[p].get(f)) for p, f in _NEEDED if p in sections}
    return {
        field: place
        for field, place in places.items()
        if place is not None and not place.is_absolute() and not str(place).startswith(_BESIDE)
    }


def _started_from(recipe: dict[str, Any], path: Path) -> dict[str, str]:
    """Return where relative paths start, seen from the folder, if that lies further in.

    So both may be moved together. Another place is not noted: it would be this machine's alone.
    """
    if not _relative(recipe) or not path.resolve().is_relative_to(Path.cwd()):
        return {}
    return {_START: os.path.relpath(Path.cwd(), path.resolve())}


def _find(recipe: dict[str, Any], path: Path, start: object) -> None:
    """Write out where files lie that are not in the folder a command runs in, as they were."""
    if not isinstance(start, str):
        return
    for (part, field), place in _relative(recipe).items():
        found = (path.resolve() / start / place).resolve()
        if not place.exists() and found.exists():
            recipe[part][field] = str(found)


def _place(recipe: dict[str, Any], path: Path) -> None:
    """Write out where the folder's own files lie; the folder may have been moved.

    In full: features are cached under the weights' place, and `model/` is another one elsewhere.
    """
    for section in recipe.values():
        for name, value in section.items() if isinstance(section, dict) else ():
            if isinstance(value, str) and value.startswith(_BESIDE):
                section[name] = str(path.resolve() / value.removeprefix(_BESIDE))
