"""Write a `Checkpoint` in any of the three forms."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clover.convert.checkpoint import Checkpoint
from clover.convert.names import to_transformers
from clover.convert.read import fill
from clover.convert.shape import qformer_config, transformers_config
from clover.core.assets import parse
from clover.core.config import QFormerConfig, Recipe
from clover.core.errors import CloverError
from clover.core.files import atomic_path, write_json, write_text
from clover.core.tensors import Entry, open_tensors, write_tensors
from clover.qformer.convert import lavis_name
from clover.qformer.tokenizer import TextTokenizer
from clover.vision.family import eva_clip

_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "spiece.model", "vocab.*", "merges.txt")
_MODEL = {"t5_proj": "t5_model", "opt_proj": "opt_model"}


@dataclass(frozen=True)
class Draft:
    """What is to be written, before anything is.

    Attributes:
        recipe: Names the files as they will lie.
        tokenizer: The Q-Former's, to be copied; None where the recipe names it elsewhere.
    """

    recipe: Recipe
    tokenizer: Path | None


def draft_clover(
    found: Checkpoint,
    target: Path,
    *,
    base: Recipe | None = None,
    tokenizer: Path | None = None,
) -> Draft:
    """Return what `write_clover` would write.

    Args:
        found: The checkpoint; what CLOVER needs and it lacks is filled.
        target: The folder.
        base: Says what the checkpoint does not.
        tokenizer: The Q-Former's, instead of the checkpoint's own.

    Raises:
        CloverError: there is no such tokenizer.
    """
    queries = qformer_config(found)
    named = _tokenizer(found, base, tokenizer)
    if "Qformer.bert.embeddings.word_embeddings.weight" not in found.entries and named is not None:
        # Never read by this Q-Former, but they must fit the tokenizer that stands beside.
        queries = queries.model_copy(update={"vocab_size": TextTokenizer(named).vocab_size})
    _complete(found, queries)
    is_elsewhere = base is not None and named == _local(base.qformer.tokenizer)
    # What the source's folder holds must not be missed when that folder goes.
    if named is not None and is_elsewhere and named.parent.resolve() != found.path.resolve():
        named = None
    recipe = recipe_of(found, target, queries, base=base, has_tokenizer=named is not None)
    return Draft(recipe, named)


def write_clover(found: Checkpoint, target: Path, draft: Draft) -> tuple[Path, Recipe]:
    """Write a folder: the trained part, frozen parts as files of their own, and `recipe.yaml`.

    Returns:
        The trained part's file, `align.safetensors` (stage 1) or `bridge.safetensors`; the recipe.
    """
    recipe = draft.recipe
    target.mkdir(parents=True, exist_ok=True)
    if not found.is_stage_1:
        # A folder written before must not look whole while its files are replaced.
        (target / "config.json").unlink(missing_ok=True)
    trained = target / ("align.safetensors" if found.is_stage_1 else "bridge.safetensors")
    write_tensors(trained, _renamed(found, lavis_name))
    if vision := found.part("visual_encoder."):
        write_tensors(target / "encoder.safetensors", vision.values())
    if found.language is not None:
        _write_language(found, target / "language")
        recipe = _with_text_start(recipe, target / "language")
    elif found.has("language_model."):
        for name in found.part("language_model."):
            found.left_out[name] = "its configuration is not here: name its folder with --language"
    own = target / "qformer_tokenizer.json"
    if draft.tokenizer is None:
        own.unlink(missing_ok=True)
    elif draft.tokenizer.resolve() != own.resolve():
        shutil.copyfile(draft.tokenizer, own)
    _note(found, target / "convert.json")
    write_text(target / "recipe.yaml", recipe.to_yaml())
    return trained, recipe


def _tokenizer(found: Checkpoint, base: Recipe | None, given: Path | None) -> Path | None:
    """Return the Q-Former's tokenizer: the given one, the source's own, or the recipe's at hand."""
    if given is not None:
        if not given.exists():
            raise CloverError(f"--tokenizer {given}: no such file")
        return given
    if found.path.is_dir():
        for name in ("qformer_tokenizer/tokenizer.json", "qformer_tokenizer.json"):
            if (found.path / name).exists():
                return found.path / name
    return None if base is None else _local(base.qformer.tokenizer)


def _local(reference: str | None) -> Path | None:
    """Return where a referenced file lies, if it does; nothing is fetched."""
    path = None if reference is None else parse(reference).path
    return path if path is not None and path.exists() else None


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
    source = found.language_folder or found.path
    if source.is_dir() and source.resolve() != folder.resolve():
        for pattern in _TOKENIZER:
            for path in source.glob(pattern):
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


def recipe_of(
    found: Checkpoint,
    folder: Path,
    queries: QFormerConfig,
    *,
    base: Recipe | None,
    has_tokenizer: bool,
) -> Recipe:
    """Return a recipe that names the converted files, and what `base` names where there is none."""
    folder = folder.absolute()  # a path in a recipe counts from where a command is run
    tree: dict[str, Any] = {} if base is None else base.model_dump(mode="json", exclude_unset=True)
    tree["name"] = folder.name
    shapes = {name: entry.shape for name, entry in found.entries.items()}
    if "visual_encoder.blocks.0.mlp.fc1.bias" in shapes:
        width = shapes["visual_encoder.cls_token"][2]
        known = [name for name, shape in eva_clip.SHAPES.items() if shape.width == width]
        grid = round((shapes["visual_encoder.pos_embed"][1] - 1) ** 0.5)
        if known:
            seen = tree.get("encoder", {})
            kept = ("licence", "licence_note", "numbers", "batch_size", "microns_per_pixel")
            if seen.get("kind") == "eva_clip":  # the same network: how it is used stays too
                kept = tuple(seen)
            tree["encoder"] = {name: seen[name] for name in kept if name in seen} | {
                "kind": "eva_clip",
                "model": known[0],
                "weights": str(folder / "encoder.safetensors"),
                "image_size": 14 * grid,
            }
    said = tree.get("qformer", {})
    own = queries.model_dump(mode="json", exclude_unset=True)
    if "vision_proj.weight" not in found.entries:
        own.pop("embedding_size")  # no tensor tells it
    # What it was to start from, it has behind it.
    tree["qformer"] = said | own | {"weights": None}
    if has_tokenizer:
        tree["qformer"]["tokenizer"] = str(folder / "qformer_tokenizer.json")
    if found.language is not None:
        tree["language"] = _language_section(found, folder, tree.get("language", {}))
    # LAVIS drops the text's weights from a Q-Former that does not read the question (SPEC, 4).
    has_text = "Qformer.bert.embeddings.word_embeddings.weight" not in found.filled
    reads = has_text and found.details.get("class") != "blip2"
    tree["tune"] = tree.get("tune", {}) | {"instruction_aware": reads}
    return Recipe.model_validate(tree)


def _language_section(found: Checkpoint, folder: Path, said: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe's section for the language model that came with the checkpoint."""
    language = found.language or {}
    is_pair = bool(language.get("is_encoder_decoder")) or language.get("model_type") == "t5"
    kind = "encoder_decoder" if is_pair else "decoder_only"
    return {"max_answer_tokens": 256} | said | {"kind": kind, "weights": str(folder / "language")}


def _with_text_start(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with the start of a text that the language model's tokenizer writes."""
    language = recipe.language
    if language.kind != "decoder_only" or "text_start" in language.model_fields_set:
        return recipe
    language = language.model_copy(update={"text_start": _start_of_text(folder)})
    return recipe.model_copy(update={"language": language})


def _start_of_text(folder: Path) -> str:
    """Return the token a tokenizer puts before every text, which CLOVER's prompts spell out."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return ""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, ImportError):
        return ""  # `clover ask` says what is wrong with it
    first = tokenizer("a")["input_ids"][:1]
    return str(tokenizer.bos_token) if first == [tokenizer.bos_token_id] else ""


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
