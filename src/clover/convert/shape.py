"""Sizes read off a checkpoint's tensors, and the configurations written from them."""

from __future__ import annotations

from typing import Any

from clover.convert.checkpoint import Checkpoint
from clover.core.config import QFormerConfig
from clover.core.errors import CloverError

_LAYER = "Qformer.bert.encoder.layer."


def qformer_config(found: Checkpoint, *, num_heads: int | None = None) -> QFormerConfig:
    """Return the Q-Former's sizes.

    Args:
        found: The checkpoint.
        num_heads: No tensor tells it; the source's own word, or 64 channels a head, when absent.

    Raises:
        CloverError: tensors that every Q-Former has are missing.
    """
    needed = ("query_tokens", "ln_vision.weight", f"{_LAYER}0.intermediate_query.dense.bias")
    for name in needed:
        if name not in found.entries:
            raise CloverError(f"{found.path} does not fit: it lacks {name}; is it BLIP-2's?")
    shapes = {name: entry.shape for name, entry in found.entries.items()}
    _, queries, width = shapes["query_tokens"]
    layers = 1 + max(int(name.split(".")[4]) for name in shapes if name.startswith(_LAYER))
    crossed = [i for i in range(layers) if f"{_LAYER}{i}.crossattention.self.key.bias" in shapes]
    words = shapes.get("Qformer.bert.embeddings.word_embeddings.weight", (30523, width))
    positions = shapes.get("Qformer.bert.embeddings.position_embeddings.weight", (512, width))
    said = (num_heads, found.details.get("num_heads"), max(1, width // 64))
    heads = next(value for value in said if value is not None)
    if heads < 1 or width % heads:
        raise CloverError(f"--heads {heads} does not divide the Q-Former's width {width}")
    return QFormerConfig(
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        intermediate_size=shapes[f"{_LAYER}0.intermediate_query.dense.bias"][0],
        vocab_size=words[0],
        max_positions=positions[0],
        encoder_width=shapes["ln_vision.weight"][0],
        num_queries=queries,
        cross_attention_frequency=crossed[1] - crossed[0] if len(crossed) > 1 else layers,
        embedding_size=shapes.get("vision_proj.weight", (256, width))[0],
        dropout=found.details.get("dropout", 0.1),
    )


def vision_config(found: Checkpoint) -> dict[str, Any]:
    """Return the image encoder's sizes as transformers writes them.

    Raises:
        CloverError: the checkpoint has no image encoder, or its number of heads is not known.
    """
    shapes = {name: entry.shape for name, entry in found.entries.items()}
    if "visual_encoder.patch_embed.proj.weight" not in shapes:
        raise CloverError(
            f"{found.path} carries no image encoder, which transformers' classes need; "
            "name EVA's weights with --encoder FILE"
        )
    width, _, patch, _ = shapes["visual_encoder.patch_embed.proj.weight"]
    grid = round((shapes["visual_encoder.pos_embed"][1] - 1) ** 0.5)
    said = found.details.get("vision", {})
    heads = said.get("num_attention_heads") or {1408: 16, 48: 4}.get(width)
    if heads is None:
        raise CloverError(f"an EVA-CLIP of width {width} is not known: 1408 (ViT-g/14) is")
    blocks = [int(n.split(".")[2]) for n in shapes if n.startswith("visual_encoder.blocks.")]
    return {
        "hidden_size": width,
        "intermediate_size": shapes["visual_encoder.blocks.0.mlp.fc1.bias"][0],
        "num_hidden_layers": 1 + max(blocks),
        "num_attention_heads": heads,
        "image_size": grid * patch,
        "patch_size": patch,
        # One number there for the blocks (1e-6) and ln_vision (1e-5): the blocks are more.
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "hidden_act": "gelu",
    }


def transformers_config(found: Checkpoint, kind: str, queries: QFormerConfig) -> dict[str, Any]:
    """Return `config.json` of one of the three classes.

    Raises:
        CloverError: a part is missing that the class needs.
    """
    qformer: dict[str, Any] = {
        "vocab_size": queries.vocab_size,
        "hidden_size": queries.hidden_size,
        "num_hidden_layers": queries.num_layers,
        "num_attention_heads": queries.num_heads,
        "intermediate_size": queries.intermediate_size,
        "max_position_embeddings": queries.max_positions,
        "cross_attention_frequency": queries.cross_attention_frequency,
        "encoder_hidden_size": queries.encoder_width,
        "hidden_dropout_prob": queries.dropout,
        "attention_probs_dropout_prob": queries.dropout,
        "layer_norm_eps": queries.layer_norm_eps,
    }
    tree: dict[str, Any] = {
        "vision_config": vision_config(found),
        "qformer_config": qformer,
        "num_query_tokens": queries.num_queries,
        "dtype": "float32",
    }
    if kind == "retrieval":
        qformer["use_qformer_text_input"] = True
        return tree | {
            "architectures": ["Blip2ForImageTextRetrieval"],
            "model_type": "blip-2",
            "image_text_hidden_size": queries.embedding_size,
        }
    if found.language is None:
        raise CloverError(
            f"{found.path} carries no language model, which transformers' classes need; name its "
            "folder with --language FOLDER"
        )
    tree["text_config"] = found.language
    # The image's places in a prompt are filled by a token of its own, the last.
    index = found.details.get("image_token_index")
    tree["image_token_index"] = found.language["vocab_size"] - 1 if index is None else index
    if kind == "instructblip":
        names = ("InstructBlipForConditionalGeneration", "instructblip")
    else:
        names = ("Blip2ForConditionalGeneration", "blip-2")
        qformer["use_qformer_text_input"] = False
    return tree | {"architectures": [names[0]], "model_type": names[1]}
