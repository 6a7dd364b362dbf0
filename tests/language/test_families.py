"""Language models that nobody wrote a line for: decoders of transformers, by their folder alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import clover
from clover.core.config import LanguageConfig, PromptConfig
from clover.language.load import load_language_model
from clover.language.protocol import GenerationSettings
from clover.tune.run import tune
from tiny import TEMPLATE, WORDS, Tiny

VOCABULARY = len(WORDS) + 4
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2": COMMON | {"num_key_value_heads": 2},
    "mistral": COMMON | {"num_key_value_heads": 2},
    "gemma": COMMON | {"num_key_value_heads": 1, "head_dim": 8},
    "gpt_neox": COMMON,
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 1,
    },
}


@pytest.fixture(params=sorted(SHAPES))
def folder(request: pytest.FixtureRequest, tiny: Tiny, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(str(request.param), **SHAPES[request.param])
    )
    made = tmp_path / str(request.param)
    model.save_pretrained(made)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (made / name).write_bytes((tiny.folder / "llama" / name).read_bytes())
    return made


def test_another_language_model_is_one_line_of_a_recipe(
    folder: Path, tiny: Tiny, tmp_path: Path
) -> None:
    small = tiny.recipe
    recipe = small.model_copy(
        update={
            "language": LanguageConfig(weights=str(folder), licence="MIT"),
            "tune": small.tune.model_copy(update={"steps": 2, "warmup_steps": 1}),
        }
    )
    tuned = tune(
        recipe,
        instructions=tiny.instructions,
        out=tmp_path / "model",
        run=tmp_path / "run",
        cache=tmp_path / "features",
    )
    assert tuned.is_finished
    answer = clover.load(tmp_path / "model").ask(tiny.image(), "which tissue is shown ?")
    assert answer.text


def test_its_loss_and_greedy_answer_are_those_of_transformers_itself(folder: Path) -> None:
    language = load_language_model(
        LanguageConfig(weights=str(folder)), PromptConfig(template=TEMPLATE, answer_end="<eos>")
    )
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    words = plain.get_input_embeddings()
    visual = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    question, answer = "is this liver ?", "no necrosis"
    before = words(torch.tensor([language.prefix_ids]))
    ids = language.instruction_ids(question)
    labels = language.answer_ids(answer)
    row = torch.cat([before, visual, words(torch.tensor([[*ids, *labels]]))], dim=1)
    with torch.no_grad():
        logits = plain(inputs_embeds=row).logits[0, -len(labels) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(
            logits.float(), torch.tensor(labels), reduction="sum"
        )
        total, count = language.loss(visual, [question], [answer])
    assert int(count) == len(labels)
    torch.testing.assert_close(total, expected, atol=1e-3, rtol=1e-4)
    seen, written = torch.cat([before, visual, words(torch.tensor([ids]))], dim=1), []
    for _ in range(5):
        with torch.no_grad():
            token = int(plain(inputs_embeds=seen).logits[0, -1].argmax())
        written.append(token)
        seen = torch.cat([seen, words(torch.tensor([[token]]))], dim=1)
    settings = GenerationSettings(max_tokens=5, min_tokens=0)
    found = language.generate_from_ids(visual, [ids], settings, prefix=language.prefix_ids)[0]
    stop = written.index(1) + 1 if 1 in written else 5
    assert found == written[:stop]
