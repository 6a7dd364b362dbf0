"""Small random models of transformers, as their own classes save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

QUERIES, WORDS = 6, 120
KINDS = ("instructblip-llama", "instructblip-t5", "blip2-opt", "blip2-t5", "retrieval")


def text_config(kind: str) -> Any:
    from transformers import LlamaConfig, OPTConfig, T5Config

    shared = {"vocab_size": WORDS, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "llama":
        return LlamaConfig(hidden_size=40, intermediate_size=64, pad_token_id=0, **shared)
    if kind == "opt":
        return OPTConfig(hidden_size=40, ffn_dim=64, word_embed_proj_dim=40, **shared)
    return T5Config(
        vocab_size=WORDS,
        d_model=40,
        d_kv=10,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dense_act_fn="gelu",
        decoder_start_token_id=0,
    )


def build(name: str, folder: Path, *, seed: int = 0) -> Any:
    """Save a model of transformers with random weights into `folder` and return it."""
    import transformers

    kind, _, language = name.partition("-")
    vision = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
        "layer_norm_eps": 1e-6,
    }
    queries = {
        "vocab_size": 199,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "encoder_hidden_size": 48,
    }
    parts = {"vision_config": vision, "qformer_config": queries, "num_query_tokens": QUERIES}
    if kind == "retrieval":
        queries["use_qformer_text_input"] = True
        config = transformers.Blip2Config(**parts, image_text_hidden_size=16)
        model = transformers.Blip2ForImageTextRetrieval(config)
    else:
        parts |= {
            "text_config": text_config(language).to_dict(),
            "image_token_index": WORDS - 1,
        }
        if kind == "instructblip":
            config = transformers.InstructBlipConfig(**parts)
            model = transformers.InstructBlipForConditionalGeneration(config)
        else:
            model = transformers.Blip2ForConditionalGeneration(transformers.Blip2Config(**parts))
    torch.manual_seed(seed)
    for label, item in model.named_parameters():
        nn.init.normal_(item, std=0.2)
        if label.endswith("qkv.bias"):
            item.data[48:96] = 0  # EVA's keys have no bias
    model.eval().save_pretrained(folder)
    return model
