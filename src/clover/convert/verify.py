"""The same random input through a source and what was made of it.

Transformers' side runs in transformers' own classes, ours and LAVIS's in ours. Where both together
would not fit into memory, the trained part runs and the frozen parts are compared byte by byte.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clover.convert.checkpoint import Checkpoint
from clover.convert.shape import qformer_config, vision_config
from clover.core.files import read_json
from clover.qformer.bridge import Bridge
from clover.qformer.convert import lavis_name
from clover.vision.family import eva_clip
from clover.vision.transformer import VisionTransformer

Outputs = dict[str, Tensor]
_LIMIT = 6 << 30  # bytes of both models together that are run whole


@dataclass(frozen=True)
class Parity:
    """How far source and result are apart.

    Attributes:
        differences: Output -> largest absolute difference.
        num_equal: Tensors that are equal bit by bit.
        num_shared: Tensors that both have.
        is_whole: Whether all parts were run, or the trained part alone.
    """

    differences: dict[str, float]
    num_equal: int
    num_shared: int
    is_whole: bool

    @property
    def largest(self) -> float:
        """The largest difference of all outputs."""
        return max(self.differences.values(), default=0.0)


def verify(source: Checkpoint, result: Checkpoint, *, num_heads: int | None = None) -> Parity:
    """Run both on the same random input and compare every tensor they share."""
    shared = [name for name in source.entries if name in result.entries]
    equal = sum(
        torch.equal(source.entries[name].read(), result.entries[name].read()) for name in shared
    )
    size = sum(_bytes(item) for item in (source, result))
    is_whole = size <= _LIMIT
    outputs = [_run(item, is_whole=is_whole, num_heads=num_heads) for item in (source, result)]
    differences = {
        name: float((outputs[0][name].double() - outputs[1][name].double()).abs().max())
        for name in outputs[0].keys() & outputs[1].keys()
    }
    return Parity(dict(sorted(differences.items())), equal, len(shared), is_whole)


def _bytes(found: Checkpoint) -> int:
    return sum(
        entry.dtype.itemsize * torch.Size(entry.shape).numel() for entry in found.entries.values()
    )


@torch.no_grad()
def _run(found: Checkpoint, *, is_whole: bool, num_heads: int | None) -> Outputs:
    config = qformer_config(found, num_heads=num_heads)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, min(config.vocab_size, 100), (2, 7), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    has_vision = found.has("visual_encoder.patch_embed")
    if has_vision and is_whole:
        size = vision_config(found)["image_size"]
        image = torch.randn(2, 3, size, size, generator=draw)
    else:
        image = torch.randn(2, 17, config.encoder_width, generator=draw)
    if found.form == "transformers" and is_whole:
        return _run_theirs(found, image, ids, mask)
    if has_vision and is_whole:
        image = _vision(found)(image)
    return _run_ours(found, image, ids, mask, num_heads=num_heads)


def _vision(found: Checkpoint) -> VisionTransformer:
    sizes = vision_config(found)
    shape = replace(
        eva_clip.SHAPES["vit_g_14"],
        width=sizes["hidden_size"],
        depth=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        inner=sizes["intermediate_size"],
        image_size=sizes["image_size"],
        patch=sizes["patch_size"],
    )
    network = VisionTransformer(shape).eval()
    entries = found.part("visual_encoder.")
    state: dict[str, Tensor] = {}
    for name, entry in entries.items():
        ours = eva_clip.rename(name)
        if ours is not None:
            state[ours] = entry.read().float()
    for index in range(shape.depth):
        bias = [entries[f"visual_encoder.blocks.{index}.attn.{kind}_bias"].read() for kind in "qv"]
        state[f"blocks.{index}.qkv.bias"] = torch.cat([bias[0], torch.zeros_like(bias[0]), bias[1]])
    network.load_state_dict(state)
    return network


def _run_ours(
    found: Checkpoint, image: Tensor, ids: Tensor, mask: Tensor, *, num_heads: int | None
) -> Outputs:
    config = qformer_config(found, num_heads=num_heads)
    projection = found.entries.get("proj.weight")
    bridge = Bridge(
        config,
        language_width=None if projection is None else projection.shape[0],
        has_alignment=found.is_stage_1,
    ).eval()
    state = {
        ours: entry.read().float()
        for name, entry in found.entries.items()
        if (ours := lavis_name(name)) is not None
    }
    bridge.load_state_dict(state, strict=False)
    keys = bridge.read_image(image)
    if found.is_stage_1:
        heads = bridge.alignment
        text = bridge.qformer.encode_text(ids, mask)
        return {
            "image_embeddings": heads.embed_image(bridge.qformer.encode_queries(keys).hidden),
            "text_embeddings": heads.embed_text(text[:, 0]),
            "match_logits": heads.match(
                bridge.qformer.encode_pair(keys, ids, mask, queries_only=True)
            ),
        }
    reads = found.details.get("class") != "blip2"
    hidden = bridge.visual_hidden(keys, *((ids, mask) if reads else ()))
    if bridge.projection is None:
        return {"query_rows": hidden}
    prefix = bridge.project(hidden)
    return {"visual_prefix": prefix} | _language(found, prefix)


def _language(found: Checkpoint, prefix: Tensor) -> Outputs:
    """Return the logits of the language model behind the visual prefix, where it came along."""
    if found.language is None or not found.has("language_model."):
        return {}
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    tree = dict(found.language)
    config = AutoConfig.for_model(tree.pop("model_type"), **tree)
    family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = family.from_config(config).eval()
    start = "language_model."
    entries = found.part(start)
    model.load_state_dict(
        {name.removeprefix(start): entry.read().float() for name, entry in entries.items()},
        strict=False,
    )
    model.tie_weights()
    ids = _prompt(config.vocab_size)
    embeds = torch.cat([prefix, model.get_input_embeddings()(ids)], dim=1)
    return {"logits": _logits(model, {"inputs_embeds": embeds}, ids)}


def _prompt(words: int) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(4, min(words - 1, 100), (2, 5), generator=draw)


def _logits(model: Any, inputs: dict[str, Tensor], ids: Tensor) -> Tensor:
    config = getattr(model.config, "text_config", model.config)
    if config.is_encoder_decoder:
        inputs = {**inputs, "decoder_input_ids": ids}
    logits: Tensor = model(**inputs).logits
    return logits[:, -ids.shape[1] :]


def _run_theirs(found: Checkpoint, image: Tensor, ids: Tensor, mask: Tensor) -> Outputs:
    """Run transformers' own class on the folder."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = found.path if found.path.is_dir() else found.path.parent
    tree = read_json(folder / "config.json")
    family = getattr(transformers, tree["architectures"][0])
    model = family.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32).eval()
    if found.is_stage_1:
        pairs = {"pixel_values": image, "input_ids": ids, "attention_mask": mask}
        apart = model(**pairs)
        together = model(**pairs, use_image_text_matching_head=True)
        return {
            "image_embeddings": apart.image_embeds,
            "text_embeddings": apart.text_embeds,
            "match_logits": together.logits_per_image,
        }
    reads = {"qformer_input_ids": ids, "qformer_attention_mask": mask}
    more = reads if tree["model_type"] == "instructblip" else {}
    features = model.get_image_features(image, **more)
    prompt = _prompt(model.config.text_config.vocab_size)
    places = torch.full((2, model.config.num_query_tokens), model.config.image_token_index)
    inputs = {"pixel_values": image, "input_ids": torch.cat([places, prompt], dim=1), **more}
    prefix = features.pooler_output if hasattr(features, "pooler_output") else features
    return {"visual_prefix": prefix, "logits": _logits(model, inputs, prompt)}
