"""Names of the published checkpoints: LAVIS's Q-Former and heads as ours (SPEC, section 7)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from clover.qformer.initialise import _LAYER

_TOP = {
    "query_tokens": "qformer.query_tokens",
    "ln_vision.weight": "vision_norm.weight",
    "ln_vision.bias": "vision_norm.bias",
    "temp": "heads.temperature",
    "vision_proj": "heads.vision_projection",
    "text_proj": "heads.text_projection",
    "itm_head": "heads.matching",
    "proj": "projection",
    "t5_proj": "projection",
    "llm_proj": "projection",
    "opt_proj": "projection",
    "Qformer.bert.embeddings.word_embeddings": "qformer.word_embedding",
    "Qformer.bert.embeddings.position_embeddings": "qformer.position_embedding",
    "Qformer.bert.embeddings.LayerNorm": "qformer.embedding_norm",
    "Qformer.cls.predictions.transform.dense": "heads.language.dense",
    "Qformer.cls.predictions.transform.LayerNorm": "heads.language.norm",
    "Qformer.cls.predictions.bias": "heads.language.bias",
}
_CROSS = {
    "cross_attention.query": "crossattention.self.query",
    "cross_attention.key": "crossattention.self.key",
    "cross_attention.value": "crossattention.self.value",
    "cross_attention.output": "crossattention.output.dense",
    "cross_attention.norm": "crossattention.output.LayerNorm",
    "query_feed_forward.inner": "intermediate_query.dense",
    "query_feed_forward.outer": "output_query.dense",
    "query_feed_forward.norm": "output_query.LayerNorm",
}
_THEIRS = {theirs: ours for ours, theirs in {**_LAYER, **_CROSS}.items()}
_BLOCK = re.compile(r"^Qformer\.bert\.encoder\.layer\.(\d+)\.(.+)\.(weight|bias)$")
_BACK = {ours: theirs for theirs, ours in reversed(_TOP.items())}
_PART = {**_LAYER, **_CROSS}
_LAYER_NAME = re.compile(r"^qformer\.layers\.(\d+)\.(.+)\.(weight|bias)$")
# Copies, buffers and frozen parts that published files carry along (SPEC, section 7.2).
_IGNORED = re.compile(
    r"position_ids$|decoder\.(weight|bias)$|^(visual_encoder|t5_model|llm_model|opt_model)\."
)


@dataclass(frozen=True)
class Converted:
    """A converted state, and the names that were left out on purpose or not understood."""

    state: dict[str, Tensor]
    ignored: list[str]
    unknown: list[str]


def lavis_name(name: str) -> str | None:
    """Return our name of a LAVIS parameter, or None."""
    name = name.removeprefix("module.")
    block = _BLOCK.match(name)
    if block:
        index, part, kind = block.groups()
        return f"qformer.layers.{index}.{_THEIRS[part]}.{kind}" if part in _THEIRS else None
    if name in _TOP:
        return _TOP[name]
    stem, _, kind = name.rpartition(".")
    return f"{_TOP[stem]}.{kind}" if stem in _TOP else None


def from_lavis(state: Mapping[str, Tensor]) -> Converted:
    """Rename a LAVIS or published-CLOVER state dict (stage 1 or 2) to a `Bridge`'s names."""
    converted = Converted({}, [], [])
    for name, tensor in state.items():
        ours = lavis_name(name)
        if ours is not None:
            converted.state[ours] = tensor
        elif _IGNORED.search(name.removeprefix("module.")):
            converted.ignored.append(name)
        else:
            converted.unknown.append(name)
    return converted


def lavis_name_of(name: str) -> str | None:
    """Return LAVIS's name of one of our parameters; the projection's is `proj` for any model."""
    block = _LAYER_NAME.match(name)
    if block is not None:
        index, part, kind = block.groups()
        return f"Qformer.bert.encoder.layer.{index}.{_PART[part]}.{kind}" if part in _PART else None
    if name in _BACK:
        return _BACK[name]
    stem, _, kind = name.rpartition(".")
    return f"{_BACK[stem]}.{kind}" if stem in _BACK else None
