"""CLIP ViT-L/14 as BLIP-2 uses it (SPEC, section 3.2): 23 of 24 blocks, QuickGELU, no last norm.

Checkpoints: OpenAI's (`visual.`), a LAVIS one (`visual_encoder.`), transformers' `CLIPVisionModel`.
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

_LARGE = Shape(
    width=1024,
    depth=23,
    num_heads=16,
    inner=4096,
    eps=1e-5,
    activation="quick_gelu",
    has_patch_bias=False,
    has_first_norm=True,
)
SHAPES = {
    "vit_l_14": _LARGE,
    # The same network in small, for tests.
    "vit_tiny_14": replace(_LARGE, width=48, depth=3, num_heads=4, inner=96),
}
_BLOCK = {
    "ln_1": "norm1",
    "ln_2": "norm2",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "attn.out_proj": "projection",
    "self_attn.out_proj": "projection",
    "mlp.c_fc": "inner",
    "mlp.c_proj": "outer",
    "mlp.fc1": "inner",
    "mlp.fc2": "outer",
}
_TOP = {
    "class_embedding": "class_token",
    "embeddings.class_embedding": "class_token",
    "positional_embedding": "positions",
    "embeddings.position_embedding.weight": "positions",
    "conv1.weight": "patches.weight",
    "embeddings.patch_embedding.weight": "patches.weight",
    **{f"ln_pre.{kind}": f"first_norm.{kind}" for kind in ("weight", "bias")},
    # transformers' own spelling
    **{f"pre_layrnorm.{kind}": f"first_norm.{kind}" for kind in ("weight", "bias")},
}
_NAME = re.compile(r"^(?:encoder\.layers|transformer\.resblocks)\.(\d+)\.(.+)\.(weight|bias)$")
_APART = re.compile(r"^encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)$")
_JOINED = re.compile(r"^transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)$")
_PREFIX = re.compile(r"^(module\.)?(visual_encoder\.|visual\.|vision_model\.)?")


def rename(name: str) -> str | None:
    """Return our name of a checkpoint's tensor; None for what is not in the network."""
    if (joined := _JOINED.match(_PREFIX.sub("", name))) is not None:
        return f"blocks.{joined[1]}.qkv.{joined[2]}"
    return own_name(name, prefix=_PREFIX, top=_TOP, block=_NAME, parts=_BLOCK)


def collect(source: TensorSource) -> Reads:
    """Find the network's tensors; transformers keeps query, key and value apart."""
    source = image_tower(source)
    reads = renamed(source, rename)
    parts = {_PREFIX.sub("", name): name for name in source}

    def joined(names: list[str]) -> Tensor:
        return torch.cat([source[name] for name in names])

    for name in parts:
        block = _APART.match(name)
        if block is None:
            continue
        index, kind = block.groups()
        names = [f"encoder.layers.{index}.self_attn.{part}_proj.{kind}" for part in "qkv"]
        if all(item in parts for item in names):
            reads[f"blocks.{index}.qkv.{kind}"] = partial(joined, [parts[n] for n in names])
    return reads


def adapt(name: str, found: Tensor, wanted: Tensor) -> Tensor:
    """Bring class token and positions, flat in these checkpoints, into the network's form."""
    if name == "class_token":
        return found.reshape(1, 1, -1)
    return resize_positions(name, found, wanted)


def build(config: EncoderConfig) -> Family:
    """Build the network.

    Raises:
        CloverError: no such size.
    """
    if config.model not in SHAPES:
        raise CloverError(f"clip knows no '{config.model}'{nearest(config.model, SHAPES)}")
    shape = replace(SHAPES[config.model], image_size=config.image_size)
    return Family(f"clip/{config.model}", VisionTransformer(shape), collect, adapt=adapt)
