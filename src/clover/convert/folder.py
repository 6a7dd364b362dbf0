"""A converted stage-2 checkpoint as a model folder: what `clover ask` opens.

Frozen parts are the checkpoint's own where it carries them, written beside `config.json` and named
`beside:`, so that the folder can be moved; otherwise they are the recipe's, by reference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from clover.convert.checkpoint import Checkpoint
from clover.core.assets import parse
from clover.core.config import EncoderConfig, Recipe
from clover.core.errors import CloverError
from clover.core.files import read_json
from clover.model import write_config
from clover.qformer.bridge import Bridge
from clover.vision.family.known import expand
from clover.vision.token_encoder import describe


def lacking(found: Checkpoint, recipe: Recipe) -> list[str]:
    """Return what a converted checkpoint needs before it can answer, each with its remedy."""
    if found.is_stage_1:
        return [
            "stage 2: this is a stage 1 checkpoint; name it in qformer.weights and `clover tune`"
        ]
    needed = []
    if "proj.weight" not in found.entries:
        needed.append("the projection into a language model: not in the source")
    if not found.has("visual_encoder.patch_embed") and not _has_weights(recipe.encoder):
        needed.append("encoder.weights: --encoder FILE, or a --recipe that names it")
    if not recipe.language.weights:
        needed.append("language.weights: --language FOLDER, or a --recipe that names it")
    if recipe.qformer.tokenizer is None:
        needed.append("qformer.tokenizer: --tokenizer FILE, or a --recipe that names it")
    return needed


def _has_weights(encoder: EncoderConfig) -> bool:
    """Return whether a recipe's encoder has weights, or needs none."""
    if encoder.kind == "known":
        encoder = expand(encoder)
    return encoder.weights is not None or encoder.kind == "tiny"


def check_model(found: Checkpoint, recipe: Recipe) -> None:
    """Compare a checkpoint that lacks nothing with the parts it is to stand beside.

    Raises:
        CloverError: the recipe's encoder or language model is of another width, or not known.
    """
    encoder = describe(recipe.encoder)
    if encoder["width"] != recipe.qformer.encoder_width:
        raise CloverError(
            f"{found.path} reads image tokens {recipe.qformer.encoder_width} wide, and those of "
            f"{encoder['id']} are {encoder['width']}; name the encoder it was trained with"
        )
    _check_language(found, recipe, found.entries["proj.weight"].shape[0])


def write_model(found: Checkpoint, recipe: Recipe, folder: Path) -> None:
    """Write `config.json` and the model card of a folder that has passed `check_model`."""
    width = found.entries["proj.weight"].shape[0]
    with torch.device("meta"):
        trainable = Bridge(recipe.qformer, language_width=width).num_trainable()
    write_config(
        folder,
        name=folder.name,
        recipe=_beside(recipe, folder),
        encoder=describe(recipe.encoder),
        language={
            "id": _short(recipe.language.weights, folder).split("?")[0],
            "width": width,
            "licence": recipe.language.licence,
        },
        trainable=trainable,
        details={"converted_from": found.path.name},
    )


def _check_language(found: Checkpoint, recipe: Recipe, width: int) -> None:
    """Compare widths where the language model's configuration is at hand."""
    path = parse(recipe.language.weights).path / "config.json"
    if found.language is None and not path.exists():
        return
    # What the checkpoint carries is not yet where the recipe says; an older one may lie there.
    shape = found.language or read_json(path)
    own = next(
        (shape[name] for name in ("hidden_size", "d_model", "n_embd") if name in shape), None
    )
    if own is not None and own != width:
        raise CloverError(
            f"{found.path} was trained for a language model {width} wide, {path.parent} is {own}; "
            "name the one it was trained with: --language FOLDER, or another --recipe"
        )


def _beside(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Return the recipe as written, with the folder's own files named from where they lie."""
    tree = recipe.model_dump(mode="json")
    for section, name in (
        ("encoder", "weights"),
        ("qformer", "tokenizer"),
        ("language", "weights"),
    ):
        if tree[section][name]:
            tree[section][name] = _short(tree[section][name], folder)
    return tree


def _short(reference: str, folder: Path) -> str:
    asset = parse(reference)
    if asset.kind == "path" and asset.path.parent == folder.absolute():
        return f"beside:{asset.path.name}"
    return reference
