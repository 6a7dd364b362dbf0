"""Whether a checkpoint has every tensor its own sizes ask for, each of the right shape.

Found before anything is written: what is missing must not become a number drawn at random, nor what
is mis-shaped an error of torch's.
"""

from __future__ import annotations

from typing import Any

import torch

from clover.convert.checkpoint import Checkpoint
from clover.convert.shape import qformer_config, vision_config
from clover.core.errors import CloverError
from clover.qformer.bridge import Bridge
from clover.qformer.convert import lavis_name_of

Shapes = dict[str, tuple[int, ...]]
_TEXT = "Qformer.bert.embeddings.word_embeddings.weight"
_CAPTIONS = "Qformer.cls.predictions."
_LANGUAGE = "language_model."


def check_whole(found: Checkpoint) -> None:
    """Compare a checkpoint with what its parts ask for.

    Raises:
        CloverError: tensors are missing or mis-shaped; they are named.
    """
    wanted = _trained(found)
    if found.has("visual_encoder."):
        wanted |= _vision(found)
    if found.language is not None and found.has(_LANGUAGE):
        wanted |= _language(found)
    missing = [name for name in wanted if name not in found.entries]
    if missing:
        raise CloverError(
            f"{found.path} does not fit: {len(missing)} of {len(wanted)} tensors are missing, for "
            f"instance {', '.join(missing[:3])}; the file is not whole, or another model's"
        )
    for name, shape in wanted.items():
        lying = tuple(found.entries[name].shape)
        if lying != shape:
            raise CloverError(
                f"{found.path} does not fit: {name} is {list(lying)}, its other tensors want "
                f"{list(shape)}; the file is damaged, or another model's"
            )


def _trained(found: Checkpoint) -> Shapes:
    """Return what learnt; parts that some classes do not have are asked for whole or not at all."""
    projection = found.entries.get("proj.weight")
    with torch.device("meta"):
        bridge = Bridge(
            qformer_config(found),
            language_width=None if projection is None else projection.shape[0],
            has_alignment=found.is_stage_1,
        )
    has_text, has_captions = _TEXT in found.entries, found.has(_CAPTIONS)
    wanted: Shapes = {}
    for ours, item in bridge.state_dict().items():
        name = lavis_name_of(ours)
        if name is None or name == "temp":
            continue
        is_text = name.startswith("Qformer.bert.embeddings.") and "LayerNorm" not in name
        is_text |= any(f".{part}." in name for part in ("intermediate", "output")) and not any(
            part in name for part in ("attention.", "_query")
        )
        if (is_text and not has_text) or (name.startswith(_CAPTIONS) and not has_captions):
            continue
        wanted[name] = tuple(item.shape)
    return wanted


def _vision(found: Checkpoint) -> Shapes:
    start = "visual_encoder."
    for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.bias"):
        if f"{start}{name}" not in found.entries:
            raise CloverError(
                f"{found.path} does not fit: {start}{name} is missing from its image encoder; the "
                "file is not whole, or another model's"
            )
    sizes = vision_config(found)
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    patch, tokens = sizes["patch_size"], (sizes["image_size"] // sizes["patch_size"]) ** 2 + 1
    wanted: Shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    for index in range(sizes["num_hidden_layers"]):
        block: Shapes = {
            "norm1.weight": (width,),
            "norm1.bias": (width,),
            "norm2.weight": (width,),
            "norm2.bias": (width,),
            "attn.qkv.weight": (3 * width, width),
            "attn.q_bias": (width,),
            "attn.v_bias": (width,),
            "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,),
            "mlp.fc1.weight": (inner, width),
            "mlp.fc1.bias": (inner,),
            "mlp.fc2.weight": (width, inner),
            "mlp.fc2.bias": (width,),
        }
        wanted |= {f"blocks.{index}.{name}": shape for name, shape in block.items()}
    return {f"{start}{name}": shape for name, shape in wanted.items()}


def _language(found: Checkpoint) -> Shapes:
    """Return the language model's tensors; of several names of one, those that are there."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    tree: dict[str, Any] = dict(found.language or {})
    kind = tree.pop("model_type", "none")
    try:
        config = AutoConfig.for_model(kind, **tree)
        family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with torch.device("meta"):
            model = family.from_config(config)
    except (ValueError, TypeError) as error:
        raise CloverError(
            f"{found.path}: transformers knows no language model of model_type '{kind}'"
        ) from error
    names: dict[int, list[str]] = {}
    for name, item in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(item), []).append(name)
    wanted: Shapes = {}
    shapes = {name: tuple(item.shape) for name, item in model.state_dict().items()}
    for same in names.values():
        lying = [name for name in same if f"{_LANGUAGE}{name}" in found.entries]
        wanted |= {f"{_LANGUAGE}{name}": shapes[name] for name in lying or same[:1]}
    return wanted
