"""Stage 2 against the published classes: image tokens through the bridge and the language model.

The golden file holds the published ids; the tiny language model's weights are in it too, its
configuration lies in the folder `tiny_llama` or `tiny_t5` beside it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import Tensor

from benchmarks.parity import Figures, Reference, difference, gradient_difference
from clover.core.config import LanguageConfig, PromptConfig
from clover.language.decoder_only import DecoderOnly
from clover.language.encoder_decoder import EncoderDecoder
from clover.language.load import load_language_model
from clover.language.prompt import Prompt


def stage2(reference: Reference) -> Figures:
    """Every listed tensor of stage 2, gradient norms through the frozen language model included."""
    bridge = reference.bridge()
    kind = reference.metadata["kind"]
    queries = bridge.config.num_queries
    ids, mask = reference["in/qformer_input_ids"], reference["in/qformer_attention_mask"]
    figures: Figures = {}
    image = bridge.read_image(reference["in/image_features_pre_ln"])
    hidden = bridge.qformer.encode_pair(image, ids, mask[:, queries:])
    kept = mask.bool()
    figures["qformer_hidden"] = difference(hidden[kept], reference["out/qformer_hidden"][kept])
    visual = bridge.visual_prefix(image, ids, mask[:, queries:])
    figures["visual_prefix"] = difference(visual, reference["out/visual_prefix"])
    compare = _llama if kind == "llama" else _t5
    loss = compare(reference, visual, figures)
    figures["loss"] = difference(loss, reference["out/loss"])
    loss.backward()
    figures["grad_norm"] = gradient_difference(bridge, reference, "grad_norm/")
    return figures


def _llama(reference: Reference, visual: Tensor, figures: Figures) -> Tensor:
    from transformers import LlamaConfig, LlamaForCausalLM

    # The published class adds a pad token, id 320, and resizes the embeddings by one.
    model = LlamaForCausalLM(LlamaConfig(**{**_config(reference, "tiny_llama"), "vocab_size": 321}))
    model.load_state_dict(_weights(reference, "llm_model"), strict=False)
    language = DecoderOnly(
        model,
        _tokenizer(end=2),
        prompt=Prompt.from_config(PromptConfig()),
        config=LanguageConfig(weights="tiny_llama"),
    )
    text_ids, text_mask = reference["in/llm_input_ids"], reference["in/llm_text_mask"]
    attended = reference["in/llm_attention_mask"].bool()
    embeds = torch.cat([visual, model.get_input_embeddings()(text_ids)], dim=1)
    figures["llm_inputs_embeds"] = difference(embeds, reference["out/llm_inputs_embeds"])
    logits = language.logits_from_ids(visual, text_ids, text_mask)
    figures["logits"] = difference(logits[attended], reference["out/logits"][attended])
    # The answer's own beginning-of-text is dropped where it follows the instruction (SPEC 4.2).
    answers = [row[1:] for row in _rows(reference, "answer")]
    total, count = language.loss_from_ids(visual, _rows(reference, "instruction"), answers)
    return total / count


def _t5(reference: Reference, visual: Tensor, figures: Figures) -> Tensor:
    language = _load_t5(reference)
    model = language.model
    instructions = _rows(reference, "instruction")
    embedded = model.get_input_embeddings()(reference["in/instruction_ids"])
    figures["llm_inputs_embeds"] = difference(
        torch.cat([visual, embedded], dim=1), reference["out/llm_inputs_embeds"]
    )
    labels = reference["in/labels"]
    answers = [row[row != -100].tolist() for row in labels]
    logits, _ = language.logits_from_ids(visual, instructions, answers)
    kept = labels != -100
    figures["logits"] = difference(logits[kept], reference["out/logits"][kept])
    total, count = language.loss_from_ids(visual, instructions, answers)
    return total / count


def _load_t5(reference: Reference) -> EncoderDecoder:
    """Load the published weights from a folder, as a user's would be: head and words untied."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in (reference.path.parent / "tiny_t5").iterdir():
            if path.name != "model.safetensors":
                shutil.copyfile(path, folder / path.name)
        save_file(_weights(reference, "t5_model"), folder / "model.safetensors", {"format": "pt"})
        settings = LanguageConfig(kind="encoder_decoder", weights=name)
        language = load_language_model(settings, PromptConfig())
    assert isinstance(language, EncoderDecoder)
    return language


def _config(reference: Reference, folder: str) -> dict[str, Any]:
    path = reference.path.parent / folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def _weights(reference: Reference, prefix: str) -> dict[str, Tensor]:
    return dict(reference.group(f"sd/{prefix}."))


def _rows(reference: Reference, name: str) -> list[list[int]]:
    ids, mask = reference[f"in/{name}_ids"], reference[f"in/{name}_mask"].bool()
    return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]


def _tokenizer(end: int) -> Any:
    """Return a tokenizer that only knows where a text ends: the ids are given."""
    from transformers import PreTrainedTokenizerFast

    words = {f"<{index}>": index for index in range(4)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<0>")),
        unk_token="<0>",
        eos_token=f"<{end}>",
        pad_token="<0>",
    )
