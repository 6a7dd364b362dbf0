"""EVA-CLIP ViT-g/14 as BLIP-2 uses it (SPEC, section 3.1): 39 of 40 blocks, eps 1e-6, all tokens.

`ln_vision`, eps 1e-5, is trained and lives in the bridge, not here.
Checkpoints: EVA's own (`eva_vit_g.pth`), a LAVIS or CLOVER one (`visual_encoder.`), transformers'
(`vision_model.`).
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from clover.core.config import EncoderConfig
from clover.core.errors import CloverError, nearest
from clover.core.tensors import TensorSource
from clover.vision.token_encoder import Family, Reads, image_tower, renamed
from clover.vision.transformer import Shape, VisionTransformer, own_name, resize_positions

SHAPES = {
    "vit_g_14": Shape(width=1408, depth=39, num_heads=16, inner=6144),
    # The same network in small, for tests.
    "vit_tiny_14": Shape(width=48, depth=3, num_heads=4, inner=96),
}
_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "attn.qkv": "qkv",
    "self_attn.qkv": "qkv",
    "attn.proj": "projection",
    "self_attn.projection": "projection",
    "mlp.fc1": "inner",
    "mlp.fc2": "outer",
}
_TOP = {
    "cls_token": "class_token",
    "embeddings.class_embedding": "class_token",
    "pos_embed": "positions",
    "embeddings.position_embedding": "positions",
    "patch_embed.proj.weight": "patches.weight",
    "patch_embed.proj.bias": "patches.bias",
    "embeddings.patch_embedding.weight": "patches.weight",
    "embeddings.patch_embedding.bias": "patches.bias",
}
_NAME = re.compile(r"^(?:encoder\.layers|blocks)\.(\d+)\.(.+)\.(weight|bias)$")
_SPLIT = re.compile(r"^blocks\.(\d+)\.attn\.q_bias$")
_PREFIX = re.compile(r"^(module\.)?(visual_encoder\.|vision_model\.)?")


def rename(name: str) -> str | None:
    """Return our name of a checkpoint's tensor; None for what is not in the network."""
    return own_name(name, prefix=_PREFIX, top=_TOP, block=_NAME, parts=_BLOCK)


def collect(source: TensorSource) -> Reads:
    """Find the network's tensors; EVA's q and v bias become one bias whose middle part is 0."""
    source = image_tower(source)
    reads = renamed(source, rename)
    parts = {_PREFIX.sub("", name): name for name in source}

    def joined(query: str, value: str) -> Tensor:
        first, last = source[query], source[value]
        return torch.cat([first, torch.zeros_like(first), last])

    for name, full in parts.items():
        block = _SPLIT.match(name)
        if block is not None and f"blocks.{block[1]}.attn.v_bias" in parts:
            value = parts[f"blocks.{block[1]}.attn.v_bias"]
            reads[f"blocks.{block[1]}.qkv.bias"] = partial(joined, full, value)
    return reads


def build(config: EncoderConfig) -> Family:
    """Build the network.

    Raises:
        CloverError: no such size.
    """
    if config.model not in SHAPES:
        raise CloverError(f"eva_clip knows no '{config.model}'{nearest(config.model, SHAPES)}")
    shape = replace(SHAPES[config.model], image_size=config.image_size)
    return Family(
        f"eva_clip/{config.model}", VisionTransformer(shape), collect, adapt=resize_positions
    )
