"""Agreement with the published classes (../shared/reference), fed with the stored ids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from clover.core.config import LanguageConfig, PromptConfig
from clover.language import GenerationSettings, Prompt
from clover.language.decoder_only import DecoderOnly
from clover.language.encoder_decoder import EncoderDecoder
from clover.language.load import load_language_model

from .tiny import word_tokenizer

REFERENCE = Path(__file__).resolve().parents[2].parent / "shared" / "reference"
PUBLISHED = Prompt.from_config(PromptConfig())
TOLERANCE = 1e-4


class Golden:
    """Tensors and metadata of one reference file."""

    def __init__(self, name: str) -> None:
        path = REFERENCE / name
        if not path.exists():
            pytest.skip(f"no {path}: the reference tensors lie beside the project, not in it")
        self.file = safe_open(path, "pt")
        self.metadata: dict[str, str] = self.file.metadata()

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self.file.get_tensor(name)
        return tensor

    def weights(self, prefix: str) -> dict[str, Tensor]:
        start = f"sd/{prefix}."
        return {k[len(start) :]: self[k] for k in list(self.file.keys()) if k.startswith(start)}

    def rows(self, name: str) -> list[list[int]]:
        """Return the unpadded id lists of ``in/<name>_ids``."""
        ids, mask = self[f"in/{name}_ids"], self[f"in/{name}_mask"].bool()
        return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]


def pieces(folder: str, model: str, questions: list[str]) -> list[list[int]]:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(REFERENCE / folder / model))
    return [processor.encode(question) for question in questions]


@pytest.fixture(scope="module")
def llama_golden() -> Golden:
    return Golden("stage2_llama_seed0.safetensors")


@pytest.fixture(scope="module")
def t5_golden() -> Golden:
    return Golden("stage2_t5_seed0.safetensors")


@pytest.fixture(scope="module")
def vicuna(llama_golden: Golden) -> DecoderOnly:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = json.loads((REFERENCE / "tiny_llama" / "config.json").read_text())
    # The published class adds a pad token, id 320, and resizes the embeddings.
    model = LlamaForCausalLM(LlamaConfig(**{**config, "vocab_size": 321}))
    weights = llama_golden.weights("llm_model")
    missing, _ = model.load_state_dict(weights, strict=False)
    assert not missing
    return DecoderOnly(
        model, end_of_two(), prompt=PUBLISHED, config=LanguageConfig(weights="tiny_llama")
    )


@pytest.fixture(scope="module")
def flan(t5_golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> EncoderDecoder:
    """Return the published weights, loaded from a folder as a user's would be."""
    folder = tmp_path_factory.mktemp("tiny_t5")
    for path in (REFERENCE / "tiny_t5").iterdir():
        if path.name != "model.safetensors":
            shutil.copyfile(path, folder / path.name)
    save_file(t5_golden.weights("t5_model"), folder / "model.safetensors", {"format": "pt"})
    settings = LanguageConfig(kind="encoder_decoder", weights=str(folder))
    language = load_language_model(settings, PromptConfig())
    assert isinstance(language, EncoderDecoder)
    return language


def end_of_two() -> Any:
    """Return a tokenizer whose end token has id 2, as the published Llama's."""
    tokenizer = word_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(2)
    return tokenizer


def test_llama_logits_agree_with_the_published_class(
    vicuna: DecoderOnly, llama_golden: Golden
) -> None:
    logits = vicuna.logits_from_ids(
        llama_golden["out/visual_prefix"],
        llama_golden["in/llm_input_ids"],
        llama_golden["in/llm_text_mask"],
    )
    attended = llama_golden["in/llm_attention_mask"].bool()
    difference = (logits - llama_golden["out/logits"])[attended].abs().max()
    assert difference <= TOLERANCE


def test_llama_loss_agrees_with_the_published_class(
    vicuna: DecoderOnly, llama_golden: Golden
) -> None:
    answers = [row[1:] for row in llama_golden.rows("answer")]  # the answer's bos is dropped
    total, count = vicuna.loss_from_ids(
        llama_golden["out/visual_prefix"], llama_golden.rows("instruction"), answers
    )
    assert int(count) == int((llama_golden["in/labels"] != -100).sum())
    assert abs(total / count - llama_golden["out/loss"]) <= TOLERANCE


def test_llama_greedy_ids_agree_with_the_published_class(
    vicuna: DecoderOnly, llama_golden: Golden
) -> None:
    questions = json.loads(llama_golden.metadata["questions"])
    prompts = [[2, *ids] for ids in pieces("tiny_llama", "tokenizer.model", questions)]
    assert [p[-24:] for p in prompts][1] == llama_golden.rows("instruction")[1]
    ids = vicuna.generate_from_ids(
        llama_golden["out/visual_prefix"], prompts, GenerationSettings(max_tokens=15)
    )
    # The published row begins with one filler id, which is not written by the model.
    assert ids == llama_golden["out/greedy_ids"][:, 1:].tolist()


def test_t5_logits_and_loss_agree_with_the_published_class(
    flan: EncoderDecoder, t5_golden: Golden
) -> None:
    labels = t5_golden["in/labels"]
    answers = [row[row != -100].tolist() for row in labels]
    logits, ours = flan.logits_from_ids(
        t5_golden["out/visual_prefix"], t5_golden.rows("instruction"), answers
    )
    assert torch.equal(ours, labels)
    kept = labels != -100
    assert (logits - t5_golden["out/logits"])[kept].abs().max() <= TOLERANCE
    total, count = flan.loss_from_ids(
        t5_golden["out/visual_prefix"], t5_golden.rows("instruction"), answers
    )
    assert abs(total / count - t5_golden["out/loss"]) <= TOLERANCE


def test_t5_greedy_ids_agree_with_the_published_class(
    flan: EncoderDecoder, t5_golden: Golden
) -> None:
    questions = json.loads(t5_golden.metadata["questions"])
    prompts = [[*flan.tokens.encode(question), 1] for question in questions]
    ids = flan.generate_from_ids(
        t5_golden["out/visual_prefix"], prompts, GenerationSettings(max_tokens=16)
    )
    assert ids == t5_golden["out/greedy_ids"][:, 1:].tolist()
