"""Write a `Checkpoint` in any of the three forms."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clover.convert.checkpoint import Checkpoint
from clover.convert.names import to_transformers
from clover.convert.read import fill
from clover.convert.shape import qformer_config, transformers_config
from clover.core.config import QFormerConfig, Recipe
from clover.core.files import atomic_path, write_json, write_text
from clover.core.tensors import Entry, open_tensors, write_tensors
from clover.qformer.convert import lavis_name
from clover.vision.family import eva_clip

_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "spiece.model", "vocab.*", "merges.txt")
_MODEL = {"t5_proj": "t5_model", "opt_proj": "opt_model"}


def write_clover(found: Checkpoint, target: Path, *, num_heads: int | None = None) -> Path:
    """Write a folder: the trained part, frozen parts as files of their own, and `recipe.yaml`.

    Returns:
        The trained part's file: `align.safetensors` (stage 1) or `bridge.safetensors`.
    """
    queries = qformer_config(found, num_heads=num_heads)
    _complete(found, queries)
    target.mkdir(parents=True, exist_ok=True)
    trained = target / ("align.safetensors" if found.is_stage_1 else "bridge.safetensors")
    write_tensors(trained, _renamed(found, lavis_name))
    if vision := found.part("visual_encoder."):
        write_tensors(target / "encoder.safetensors", vision.values())
    if found.language is not None:
        _write_language(found, target / "language")
    tokenizer = found.path / "qformer_tokenizer" / "tokenizer.json"
    if found.path.is_dir() and tokenizer.exists():
        shutil.copyfile(tokenizer, target / "qformer_tokenizer.json")
    _note(found, target / "convert.json")
    write_text(target / "recipe.yaml", recipe_of(found, target, queries).to_yaml())
    return trained


def _renamed(found: Checkpoint, rename: Callable[[str], str | None]) -> list[Entry]:
    named = ((rename(name), entry) for name, entry in found.entries.items())
    return [replace(entry, name=name) for name, entry in named if name is not None]


def _complete(found: Checkpoint, queries: QFormerConfig) -> None:
    """Fill with zeros what CLOVER's module has and the source has not."""
    width, inner = queries.hidden_size, queries.intermediate_size
    unread = "not in the source; never read, as this Q-Former does not read the question"
    bert = "Qformer.bert"
    wanted: dict[str, tuple[int, ...]] = {
        f"{bert}.embeddings.word_embeddings.weight": (queries.vocab_size, width),
        f"{bert}.embeddings.position_embeddings.weight": (queries.max_positions, width),
    }
    for index in range(queries.num_layers):
        layer = f"{bert}.encoder.layer.{index}"
        wanted |= {
            f"{layer}.intermediate.dense.weight": (inner, width),
            f"{layer}.intermediate.dense.bias": (inner,),
            f"{layer}.output.dense.weight": (width, inner),
            f"{layer}.output.dense.bias": (width,),
            f"{layer}.output.LayerNorm.weight": (width,),
            f"{layer}.output.LayerNorm.bias": (width,),
        }
    reasons = dict.fromkeys(wanted, unread)
    if found.is_stage_1:
        head = "Qformer.cls.predictions"
        captions: dict[str, tuple[int, ...]] = {
            f"{head}.transform.dense.weight": (width, width),
            f"{head}.transform.dense.bias": (width,),
            f"{head}.transform.LayerNorm.weight": (width,),
            f"{head}.transform.LayerNorm.bias": (width,),
            f"{head}.bias": (queries.vocab_size,),
            "temp": (),
        }
        wanted |= captions
        reasons |= dict.fromkeys(captions, "not in the source; train before captions are asked for")
    for name, shape in wanted.items():
        if name not in found.entries:
            fill(found, name, shape, reasons[name])
    if "temp" in found.filled:
        like = found.entries["temp"]
        found.entries["temp"] = replace(like, read=partial(torch.full, (), 0.07, dtype=like.dtype))
        found.filled["temp"] = "not in the source; starts at 0.07"


def _write_language(found: Checkpoint, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "language_model."
    entries = [
        replace(entry, name=name.removeprefix(prefix)) for name, entry in found.part(prefix).items()
    ]
    write_tensors(folder / "model.safetensors", entries)
    assert found.language is not None
    write_json(folder / "config.json", found.language)
    if found.path.is_dir():
        for pattern in _TOKENIZER:
            for path in found.path.glob(pattern):
                if path.is_file():
                    shutil.copyfile(path, folder / path.name)


def _note(found: Checkpoint, path: Path) -> None:
    """Write down what the form cannot say, what was left out and what was filled."""
    write_json(
        path,
        {
            "source": found.path.name,
            "form": found.form,
            "details": found.details,
            "language": found.language,
            "left_out": found.left_out,
            "filled": found.filled,
        },
    )


def recipe_of(found: Checkpoint, folder: Path, queries: QFormerConfig) -> Recipe:
    """Return a recipe that names the converted files."""
    tree: dict[str, object] = {"name": folder.name}
    shapes = {name: entry.shape for name, entry in found.entries.items()}
    if "visual_encoder.blocks.0.mlp.fc1.bias" in shapes:
        width = shapes["visual_encoder.cls_token"][2]
        known = [name for name, shape in eva_clip.SHAPES.items() if shape.width == width]
        grid = round((shapes["visual_encoder.pos_embed"][1] - 1) ** 0.5)
        if known:
            tree["encoder"] = {
                "kind": "eva_clip",
                "model": known[0],
                "weights": str(folder / "encoder.safetensors"),
                "image_size": 14 * grid,
            }
    tokenizer = folder / "qformer_tokenizer.json"
    own = queries.model_dump(mode="json")
    own["tokenizer"] = str(tokenizer) if tokenizer.exists() else None
    tree["qformer"] = own
    if found.language is not None:
        is_pair = bool(found.language.get("is_encoder_decoder")) or (
            found.language.get("model_type") == "t5"
        )
        tree["language"] = {
            "kind": "encoder_decoder" if is_pair else "decoder_only",
            "weights": str(folder / "language"),
            "max_answer_tokens": 256,
        }
    tree["tune"] = {"instruction_aware": found.details.get("class") != "blip2"}
    return Recipe.model_validate(tree)


def write_lavis(found: Checkpoint, target: Path) -> Path:
    """Write `{"model": state}` as torch does, and beside it what such a file cannot say."""
    projection = found.details.get("projection") or _projection_name(found)

    def rename(name: str) -> str:
        if name.startswith("language_model."):
            model = _MODEL.get(projection, "llm_model")
            return f"{model}.{name.removeprefix('language_model.')}"
        return f"{projection}.{name.removeprefix('proj.')}" if name.startswith("proj.") else name

    found.details["projection"] = projection
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".convert-") as folder:
        plain = Path(folder) / "tensors.safetensors"
        write_tensors(plain, _renamed(found, rename))
        state = {name: _mapped(plain, name) for name in open_tensors(plain)}
        words = "Qformer.bert.embeddings.word_embeddings.weight"
        head = "Qformer.cls.predictions"
        if f"{head}.bias" in state:  # published files hold the tied decoder under its own name too
            state[f"{head}.decoder.weight"] = state[words]
            state[f"{head}.decoder.bias"] = state[f"{head}.bias"]
        with atomic_path(target) as partial_path:
            torch.save({"model": state}, partial_path)
    _note(found, target.with_name(f"{target.name}.json"))
    return target


def _projection_name(found: Checkpoint) -> str:
    kind = (found.language or {}).get("model_type", "")
    return {"t5": "t5_proj", "opt": "opt_proj"}.get(kind, "llm_proj")


def _mapped(path: Path, name: str) -> Tensor:
    """Return a tensor that stays on disk until it is read."""
    place = open_tensors(path).places[name]
    if place.num_elements == 0 or not place.shape:
        return place.read()
    raw = np.memmap(path, dtype=np.uint8, mode="r", offset=place.offset, shape=(place.num_bytes,))
    with warnings.catch_warnings():
        # torch warns of memory that may not be written; it is only read here.
        warnings.simplefilter("ignore", UserWarning)
        flat = torch.from_numpy(raw)
    return flat.view(place.dtype).view(place.shape)


def write_transformers(found: Checkpoint, target: Path, *, num_heads: int | None = None) -> Path:
    """Write a folder that transformers' `from_pretrained` reads.

    Raises:
        CloverError: the class needs a part that the source lacks.
    """
    kind = "retrieval" if found.is_stage_1 else found.details.get("class", "instructblip")
    config = transformers_config(found, kind, qformer_config(found, num_heads=num_heads))
    entries: list[Entry] = []
    for name, entry in found.entries.items():
        if name.endswith((".attn.q_bias", ".attn.v_bias")):
            continue
        theirs = to_transformers(name, kind)
        if theirs is not None:
            entries.append(replace(entry, name=theirs))
        elif name not in found.filled:
            found.left_out[name] = f"{config['architectures'][0]} has no such tensor"
    for name, entry in found.entries.items():
        if name.endswith(".attn.q_bias"):
            entries.append(_joined_bias(found, name, entry))
    target.mkdir(parents=True, exist_ok=True)
    write_tensors(target / "model.safetensors", entries)
    write_json(target / "config.json", config)
    _note(found, target / "convert.json")
    return target


def _joined_bias(found: Checkpoint, name: str, query: Entry) -> Entry:
    value = found.entries[name.replace("q_bias", "v_bias")]
    block = name.split(".")[2]

    def read() -> Tensor:
        first = query.read()
        return torch.cat([first, torch.zeros_like(first), value.read()])

    joined = f"vision_model.encoder.layers.{block}.self_attn.qkv.bias"
    return Entry(joined, query.dtype, (3 * query.shape[0],), read)
