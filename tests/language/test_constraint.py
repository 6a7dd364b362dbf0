"""Replies held to a JSON schema: whatever the weights say, the text parses."""

from __future__ import annotations

import json
import string
import sys
from typing import Any

import pytest
import torch

from clover.core.config import LanguageConfig, PromptConfig
from clover.core.errors import CloverError
from clover.language.chat import complete
from clover.language.constraint import SchemaCompiler
from clover.language.decoder_only import DecoderOnly
from clover.language.generation import iterate_tokens
from clover.language.prompt import Prompt
from clover.language.protocol import GenerationSettings

from .tiny import tiny_llama

pytest.importorskip("llguidance", reason="the extra [structured] is not installed")

PAIRS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "pairs": {
            "type": "array",
            "minItems": 2,
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {
                    "answer": {"type": "string", "enum": ["fat", 'a "pearl"', "no"]},
                    "question": {"type": "string", "maxLength": 12},
                },
                "required": ["answer", "question"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["pairs"],
    "additionalProperties": False,
}


def byte_llama() -> DecoderOnly:
    """Return a tiny random model whose tokens are bytes, so that it can write JSON at all."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(["<eos>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    torch.manual_seed(0)
    config = LlamaConfig(
        # More scores than tokens, as models padded to a round number have.
        vocab_size=288,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
    )
    prompt = Prompt.from_config(PromptConfig(template="{image}{question}\n", answer_end="<eos>"))
    settings = LanguageConfig(weights="byte-llama", licence="none")
    return DecoderOnly(LlamaForCausalLM(config), fast, prompt=prompt, config=settings)


@pytest.fixture(scope="module")
def language() -> DecoderOnly:
    return byte_llama()


@pytest.fixture(scope="module")
def compiler(language: DecoderOnly) -> SchemaCompiler:
    return SchemaCompiler(language.tokens, language.vocabulary_size)


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_every_sampled_reply_satisfies_the_schema(
    language: DecoderOnly, compiler: SchemaCompiler
) -> None:
    settings = GenerationSettings(max_tokens=400, temperature=1.5)
    schema, count = compiler.compile(PAIRS), 24
    replies = complete(
        language,
        [ask(f"caption {number}") for number in range(count)],
        settings,
        seeds=range(count),
        constraints=[schema.begin() for _ in range(count)],
    )
    assert len({reply.text for reply in replies}) > count // 2, "the model must still choose"
    for reply in replies:
        assert reply.finish_reason == "stop"
        found = json.loads(reply.text)
        assert list(found) == ["pairs"]
        assert 2 <= len(found["pairs"]) <= 3
        for pair in found["pairs"]:
            assert set(pair) == {"answer", "question"}
            assert pair["answer"] in ("fat", 'a "pearl"', "no")
            assert len(pair["question"]) <= 12


def test_without_the_schema_the_same_model_writes_no_json(language: DecoderOnly) -> None:
    # Guards the test above: it would prove nothing of a model that writes JSON by itself.
    [reply] = complete(language, [ask("caption")], GenerationSettings(max_tokens=50))
    with pytest.raises(ValueError):
        json.loads(reply.text)


def test_rows_of_one_batch_may_have_different_schemas_or_none(
    language: DecoderOnly, compiler: SchemaCompiler
) -> None:
    settings = GenerationSettings(max_tokens=60)
    one = compiler.compile({"type": "string", "enum": ["yes", "no"]})
    other = compiler.compile({"type": "integer", "minimum": 10, "maximum": 99})

    def answers(rows: list[int]) -> list[str]:
        held = [one.begin(), None, other.begin()]
        chosen = [held[row] for row in rows]
        texts = [ask(f"caption {row}") for row in rows]
        return [r.text for r in complete(language, texts, settings, constraints=chosen)]

    together = answers([0, 1, 2])
    assert json.loads(together[0]) in ("yes", "no")
    assert 10 <= json.loads(together[2]) <= 99
    assert together == [answers([row])[0] for row in range(3)]


def test_a_pattern_is_held_to(language: DecoderOnly, compiler: SchemaCompiler) -> None:
    schema = compiler.compile({"type": "string", "pattern": r"^(What|Where) [a-z ]{3,9}\?$"})
    settings = GenerationSettings(max_tokens=60, temperature=2.0)
    [reply] = complete(language, [ask("x")], settings, constraints=[schema.begin()])
    text = json.loads(reply.text)
    assert text.startswith(("What ", "Where "))
    assert text.endswith("?")
    assert set(text) <= set(string.ascii_letters + " ?")


def test_the_loop_asks_each_row_for_its_own_mask_until_it_has_ended() -> None:
    class Steps:
        def step(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(ids), 4)

        def keep(self, rows: torch.Tensor) -> None:
            pass

    class Only:
        def __init__(self, tokens: list[int]) -> None:
            self.left = tokens

        def allowed(self) -> torch.Tensor:
            return torch.arange(4) == self.left[0]

        def accept(self, token: int) -> None:
            assert token == self.left.pop(0)

    steps = iterate_tokens(
        torch.zeros(3, 4),
        Steps(),
        GenerationSettings(min_tokens=0, max_tokens=4),
        stop_ids=frozenset({3}),
        constraints=[Only([3]), Only([2, 1, 3]), Only([1, 1, 2, 3])],
    )
    assert list(steps) == [[(0, 3), (1, 2), (2, 1)], [(1, 1), (2, 1)], [(1, 3), (2, 2)], [(2, 3)]]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "strng"}, "strng"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"$ref": "#/nowhere"}, "nowhere"),
    ],
)
def test_a_schema_that_cannot_be_held_to_says_what_is_wrong(
    compiler: SchemaCompiler, schema: dict[str, Any], message: str
) -> None:
    with pytest.raises(CloverError, match=message):
        compiler.compile(schema)


def test_absent_library_is_one_line_that_names_the_extra(
    language: DecoderOnly, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(CloverError, match=r"\[structured\]"):
        SchemaCompiler(language.tokens, language.vocabulary_size)


def test_a_tokenizer_of_another_kind_is_refused_or_served_never_half_served() -> None:
    words = tiny_llama()
    try:
        compiler = SchemaCompiler(words.tokens, words.vocabulary_size)
        schema = compiler.compile(PAIRS)
    except CloverError as error:
        assert "JSON schema" in str(error)
        return
    with pytest.raises(CloverError, match="no token"):
        complete(
            words, [ask("liver")], GenerationSettings(max_tokens=9), constraints=[schema.begin()]
        )
