"""Read any of the three forms as a `Checkpoint`."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clover.convert.checkpoint import Checkpoint
from clover.convert.names import QKV_BIAS, from_transformers
from clover.core.errors import CloverError
from clover.core.files import read_json
from clover.core.tensors import Entry, Place, TensorSource, open_tensors
from clover.model_folder import named_recipe, read_config
from clover.qformer.convert import lavis_name, lavis_name_of
from clover.vision.family import eva_clip

_CLASSES = {
    "InstructBlipForConditionalGeneration": "instructblip",
    "Blip2ForConditionalGeneration": "blip2",
    "Blip2ForImageTextRetrieval": "retrieval",
}
_LANGUAGE = ("t5_model.", "llm_model.", "opt_model.")
_LEFTOVERS = ("embed_tokens.weight", "inv_freq")
_EVA_NAME = re.compile(
    r"^(?:cls_token|pos_embed|patch_embed\.proj\.\w+|blocks\.(\d+)\.(?:norm1|norm2|attn|mlp)\..+)$"
)
_TIED = ("Qformer.cls.predictions.decoder.weight", "Qformer.cls.predictions.decoder.bias")


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint of any form; only its table of contents is read.

    Raises:
        CloverError: absent, damaged, a pickle that holds more than tensors, or of no known form.
    """
    path = Path(path)
    if path.is_dir() and (path / "config.json").exists():
        config = read_json(path / "config.json")
        if isinstance(config, dict) and "architectures" in config:
            return _read_transformers(path, config)
        if isinstance(config, dict) and "recipe" in config:
            return _read_clover(path, config)
        raise CloverError(
            f"{path}/config.json names neither transformers' architectures nor a CLOVER recipe"
        )
    source = open_tensors(path)
    names = [name.removeprefix("module.") for name in source]
    if any(name.startswith("qformer.query_tokens") for name in names):
        return _read_clover(path, {})
    if any(name.startswith(("Qformer.", "query_tokens")) for name in names):
        return _read_lavis(path, source)
    raise CloverError(
        f"{path} is no BLIP-2 checkpoint: it begins with {', '.join(names[:3])}; expected LAVIS's "
        "Qformer.*, CLOVER's qformer.*, or a transformers folder with config.json"
    )


def _read_lavis(path: Path, source: TensorSource) -> Checkpoint:
    """LAVIS stage 1 or 2, and the published CLOVER's files, whose keys begin with `module.`."""
    found = Checkpoint(path, "lavis")
    places = {name.removeprefix("module."): place for name, place in source.places.items()}
    # Frozen weights are not in published files, only their aliases and tables (SPEC, 7.2).
    own = [_language_name(name) for name in places]
    whole = any(name and not name.endswith(_LEFTOVERS) for name in own)
    for name, place in places.items():
        if name in _TIED:
            found.left_out[name] = "a second name of another tensor of the file"
        elif name.endswith((".position_ids", "rotary_emb.inv_freq")):
            found.left_out[name] = "a table that every program makes for itself"
        elif name.startswith(_LANGUAGE):
            rest = _language_name(name)
            if whole:
                found.add(f"language_model.{rest}", place)
            else:
                found.left_out[name] = "left over from the frozen language model, which is not here"
        elif name.startswith("visual_encoder.") or lavis_name(name) is not None:
            found.add(_projection(name), place)
        else:
            found.left_out[name] = "not understood"
    found.details["projection"] = next(
        (name.split(".")[0] for name in places if _projection(name).startswith("proj.")), None
    )
    _recall(found, path.with_name(f"{path.name}.json"))
    return found


def _recall(found: Checkpoint, beside: Path) -> None:
    """Take what an earlier conversion wrote down: what the form itself cannot say."""
    if beside.exists():
        said = read_json(beside)
        found.language = said.get("language") or found.language
        found.details |= {name: item for name, item in said.get("details", {}).items() if item}


def _language_name(name: str) -> str:
    for prefix in _LANGUAGE:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return ""


def _projection(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    return f"proj.{kind}" if stem in ("t5_proj", "llm_proj", "opt_proj") else name


def _read_transformers(path: Path, config: dict[str, Any]) -> Checkpoint:
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in _CLASSES:
        raise CloverError(f"{path} holds a {architecture}; convert reads {', '.join(_CLASSES)}")
    found = Checkpoint(path, "transformers", language=config.get("text_config"))
    queries = config["qformer_config"]
    found.details = {
        "class": _CLASSES[architecture],
        "num_heads": queries.get("num_attention_heads", 12),
        "dropout": queries.get("hidden_dropout_prob", 0.1),
        "vision": config["vision_config"],
        "image_token_index": config.get("image_token_index"),
    }
    if _CLASSES[architecture] == "retrieval":
        found.language = None
    for name, place in open_tensors(path).places.items():
        bias = QKV_BIAS.match(name)
        if bias is not None:
            _split_bias(found, f"visual_encoder.blocks.{bias[1]}.attn", place)
            continue
        ours = from_transformers(name)
        if ours is None:
            found.left_out[name] = "not understood"
        else:
            found.add(ours, place)
    return found


def _split_bias(found: Checkpoint, block: str, place: Place) -> None:
    """Take q and v of a joined bias. The key's moves all scores of a query alike: no effect."""
    width = place.shape[0] // 3
    step = place.dtype.itemsize

    for part, kind in ((0, "q"), (2, "v")):
        piece = Place(place.path, place.offset + part * width * step, place.dtype, (width,))
        found.add(f"{block}.{kind}_bias", piece)
    middle = Place(place.path, place.offset + width * step, place.dtype, (width,)).read()
    if bool(middle.any()):
        found.left_out[f"{block}.k_bias"] = "the key's bias is not 0; it has no effect on attention"


def _read_clover(path: Path, config: dict[str, Any]) -> Checkpoint:
    """A model folder, a converted folder, or a bridge or `align.safetensors` alone."""
    found = Checkpoint(path, "clover")
    recipe = config.get("recipe", {})
    queries, tune = recipe.get("qformer", {}), recipe.get("tune", {})
    found.details = {
        "num_heads": queries.get("num_heads"),
        "dropout": queries.get("dropout", 0.1),
        "class": "instructblip" if tune.get("instruction_aware", True) else "blip2",
    }
    for name, place in open_tensors(path).places.items():
        theirs = lavis_name_of(name)
        if theirs is None:
            found.left_out[name] = "not understood"
        else:
            found.add(theirs, place)
    folder = path if path.is_dir() else path.parent
    if config:
        found.recipe = named_recipe(read_config(path), path)  # its parts may lie elsewhere
    _recall(found, folder / "convert.json")
    encoder, language = folder / "encoder.safetensors", folder / "language"
    with_parts(
        found,
        encoder=encoder if encoder.exists() else None,
        language=language if (language / "config.json").exists() else None,
    )
    return found


def with_parts(
    found: Checkpoint, *, encoder: Path | None = None, language: Path | None = None
) -> None:
    """Add frozen parts that lie elsewhere.

    Args:
        found: Changed in place.
        encoder: An EVA-CLIP checkpoint.
        language: A language model's folder in transformers' form.
    """
    if encoder is not None:
        source = open_tensors(encoder)
        if any(name.startswith("vision_model.") for name in source):
            for name, place in source.places.items():
                bias = QKV_BIAS.match(name)
                if bias is not None:
                    _split_bias(found, f"visual_encoder.blocks.{bias[1]}.attn", place)
                elif (ours := from_transformers(name)) is not None and ours.startswith("visual_"):
                    found.add(ours, place)
        else:
            _add_eva(found, source)
    if language is not None:
        if not (language / "config.json").exists():
            raise CloverError(f"{language} is no folder in transformers' form: no config.json")
        found.language, found.language_folder = read_json(language / "config.json"), language
        for name, place in open_tensors(language).places.items():
            found.add(f"language_model.{name}", place)


def _add_eva(found: Checkpoint, source: TensorSource) -> None:
    """Add EVA's own file, which has a block more than the published system runs (SPEC, 3.1)."""
    places = {name.removeprefix("visual_encoder."): item for name, item in source.places.items()}
    width = places["cls_token"].shape[-1] if "cls_token" in places else 0
    depths = [shape.depth for shape in eva_clip.SHAPES.values() if shape.width == width]
    for name, place in places.items():
        block = _EVA_NAME.match(name)
        if block is None:
            found.left_out[name] = "not read: neither block nor patches of EVA's encoder"
        elif block[1] is not None and depths and int(block[1]) >= depths[0]:
            found.left_out[name] = (
                f"the published system runs {depths[0]} blocks and drops the last"
            )
        else:
            found.add(f"visual_encoder.{name}", place)


def zeros(entry_shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor of zeros."""
    return torch.zeros(entry_shape, dtype=dtype)


def fill(found: Checkpoint, name: str, shape: tuple[int, ...], reason: str) -> None:
    """Put zeros where a source lacks a tensor; it is listed."""
    dtype = found.entries["query_tokens"].dtype
    found.entries[name] = Entry(name, dtype, shape, partial(zeros, shape, dtype))
    found.filled[name] = reason
