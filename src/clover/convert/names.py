"""Names of the same tensors in LAVIS and in transformers (SPEC, section 7.3).

LAVIS's names are the common ones here; `clover.qformer.convert` has CLOVER's.
"""

from __future__ import annotations

import re

VISION = {
    "visual_encoder.cls_token": "vision_model.embeddings.class_embedding",
    "visual_encoder.pos_embed": "vision_model.embeddings.position_embedding",
    "visual_encoder.patch_embed.proj.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual_encoder.patch_embed.proj.bias": "vision_model.embeddings.patch_embedding.bias",
    "ln_vision.weight": "vision_model.post_layernorm.weight",
    "ln_vision.bias": "vision_model.post_layernorm.bias",
}
BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
HEADS = {
    "vision_proj": "vision_projection",
    "text_proj": "text_projection",
    "itm_head": "itm_head",
    "proj": "language_projection",
}
_LAVIS_BLOCK = re.compile(r"^visual_encoder\.blocks\.(\d+)\.(.+)\.(weight|bias)$")
_THEIR_BLOCK = re.compile(r"^vision_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$")
_EMBEDDING = re.compile(r"^(?:qformer\.)?embeddings\.(word|position)_embeddings\.weight$")
_THEIR_VISION = {theirs: ours for ours, theirs in VISION.items()}
_THEIR_PART = {theirs: ours for ours, theirs in BLOCK.items()}
_THEIR_HEAD = {theirs: ours for ours, theirs in HEADS.items()}
QKV_BIAS = re.compile(r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv\.bias$")


def from_transformers(name: str) -> str | None:
    """Return LAVIS's name of a transformers tensor; None for what LAVIS does not have.

    `qkv.bias` is no single tensor there: see `QKV_BIAS`.
    """
    if name in _THEIR_VISION:
        return _THEIR_VISION[name]
    if name == "query_tokens" or name.startswith("language_model."):
        return name
    if (block := _THEIR_BLOCK.match(name)) is not None:
        part = _THEIR_PART.get(block[2])
        return None if part is None else f"visual_encoder.blocks.{block[1]}.{part}.{block[3]}"
    if (embedding := _EMBEDDING.match(name)) is not None:
        return f"Qformer.bert.embeddings.{embedding[1]}_embeddings.weight"
    stem, _, kind = name.rpartition(".")
    if stem in ("qformer.layernorm", "qformer.embeddings.layernorm"):
        return f"Qformer.bert.embeddings.LayerNorm.{kind}"
    if stem in _THEIR_HEAD:
        return f"{_THEIR_HEAD[stem]}.{kind}"
    if name.startswith("qformer.encoder."):
        rest = name.removeprefix("qformer.").replace("attention.attention.", "attention.self.")
        return f"Qformer.bert.{rest}"
    return None


def to_transformers(name: str, kind: str) -> str | None:
    """Return the name of a LAVIS tensor in a transformers class.

    Args:
        name: LAVIS's.
        kind: `instructblip`, `blip2` or `retrieval`.

    Returns:
        None for what that class does not have.
    """
    if name in VISION:
        return VISION[name]
    if name == "query_tokens":
        return name
    if name.startswith("language_model."):
        return None if kind == "retrieval" else name
    if (block := _LAVIS_BLOCK.match(name)) is not None:
        part = BLOCK.get(block[2])
        return None if part is None else f"vision_model.encoder.layers.{block[1]}.{part}.{block[3]}"
    stem, _, last = name.rpartition(".")
    if stem in HEADS:
        is_there = (stem == "proj") != (kind == "retrieval")
        return f"{HEADS[stem]}.{last}" if is_there else None
    if stem == "Qformer.bert.embeddings.LayerNorm":
        inner = "embeddings." if kind == "instructblip" else ""
        return f"qformer.{inner}layernorm.{last}"
    if stem.startswith("Qformer.bert.embeddings."):
        if kind == "blip2":
            return None
        outer = "qformer." if kind == "instructblip" else ""
        return f"{outer}{name.removeprefix('Qformer.bert.')}"
    if name.startswith("Qformer.bert.encoder.layer."):
        rest = name.removeprefix("Qformer.bert.")
        if kind == "blip2" and re.search(r"\.\d+\.(intermediate|output)\.", rest):
            return None
        return "qformer." + rest.replace("attention.self.", "attention.attention.")
    return None
