"""Tiny language models with random weights, built rather than downloaded."""

from __future__ import annotations

from typing import Any

import torch

from clover.core.config import LanguageConfig, PromptConfig
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


QUESTIONS = ["is there necrosis ?", "describe the image", "what tissue is shown in the image ?"]
ANSWERS = ["no", "colon with moderate fibrosis and many cells", "liver"]
