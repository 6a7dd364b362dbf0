"""Tiny language models with random weights, built rather than downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from clover.core.config import LanguageConfig, PromptConfig
from clover.language import dequantise
from clover.language.decoder_only import DecoderOnly
from clover.language.encoder_decoder import EncoderDecoder
from clover.language.prompt import Prompt

SPECIAL = ["<unk>", "<eos>", "<user>", "<assistant>"]
TEXT = """is there necrosis what tissue shown describe the image yes no colon liver lymph node with
keratin and fibrosis stain a of in ? . moderate cells many few"""
WORDS = SPECIAL + TEXT.split()
TEMPLATE = "<user> {image}{question} <assistant>"


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>", "<user>", "<assistant>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    )
    fast.chat_template = (
        "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return fast


def tiny_llama(
    template: str = TEMPLATE, *, width: int = 32, inner: int = 48, **limits: int
) -> DecoderOnly:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        # Wide weights: otherwise every token is about as likely as every other.
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
    )
    prompt = Prompt.from_config(PromptConfig(template=template, answer_end="<eos>"))
    settings = LanguageConfig(weights="tiny-llama", licence="none", **limits)
    return DecoderOnly(LlamaForCausalLM(config), word_tokenizer(), prompt=prompt, config=settings)


def tiny_t5() -> EncoderDecoder:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(WORDS),
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.1,
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    prompt = Prompt.from_config(PromptConfig(template="{image}{question}"))
    settings = LanguageConfig(kind="encoder_decoder", weights="tiny-t5", licence="none")
    model = T5ForConditionalGeneration(config)
    for weights in model.parameters():
        torch.nn.init.normal_(weights, std=0.3)
    return EncoderDecoder(model, word_tokenizer(), prompt=prompt, config=settings)


def write_gguf(
    path: Path,
    language: DecoderOnly,
    architecture: str = "llama",
    *,
    pre: str = "smollm",
    rope: tuple[str, float] | None = None,
    words: list[str] | None = None,
) -> None:
    """Write a tiny Llama as llama.cpp would: other names, rotary pairs side by side."""
    from gguf import GGUFWriter

    model = language.model
    config = model.config
    names = yaml.safe_load(dequantise._NAMES.read_text())["llama"]
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    tokenizer = language.tokens.tokenizer
    # Byte-pair merging starts from single letters, so two words make room for them.
    words = words or [*tokenizer.convert_ids_to_tokens(range(config.vocab_size))[:-2], "n", "o"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    if rope is not None:
        writer.add_string(f"{architecture}.rope.scaling.type", rope[0])
        writer.add_float32(f"{architecture}.rope.scaling.factor", rope[1])
    writer.add_token_list(words)
    writer.add_token_types([3 if word.startswith("<") else 1 for word in words])
    writer.add_token_merges(["n o"])
    writer.add_eos_token_id(1)
    ours = {
        **{f"{theirs}.weight": f"{key}.weight" for key, theirs in names["outside"].items()},
        **{
            f"{theirs.format(n=n)}.weight": f"blk.{n}.{key}.weight"
            for key, theirs in names["block"].items()
            for n in range(config.num_hidden_layers)
        },
    }
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, num_heads in heads.items():
            if part in name:
                halves = array.reshape(num_heads, 2, -1, array.shape[-1])
                array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        writer.add_tensor(ours[name], array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


QUESTIONS = ["is there necrosis ?", "describe the image", "what tissue is shown in the image ?"]
ANSWERS = ["no", "colon with moderate fibrosis and many cells", "liver"]
