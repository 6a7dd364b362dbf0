"""Fewer bits, dropout as published, and the token before the prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clover.core.config import LanguageConfig, PromptConfig
from clover.core.errors import CloverError
from clover.language import GenerationSettings
from clover.language.decoder_only import DecoderOnly
from clover.language.encoder_decoder import EncoderDecoder
from clover.language.load import load_language_model
from clover.language.quantise import Int8Linear

from .tiny import ANSWERS, QUESTIONS, TEMPLATE, tiny_llama, tiny_t5

PROMPT = PromptConfig(template=TEMPLATE, answer_end="<eos>")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    language = tiny_llama()
    language.model.save_pretrained(tmp_path)
    language.tokens.tokenizer.save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path, **settings: object) -> DecoderOnly:
    config = LanguageConfig(weights=str(folder), **settings)  # type: ignore[arg-type]
    language = load_language_model(config, PROMPT)
    assert isinstance(language, DecoderOnly)
    return language


def test_a_weight_row_becomes_integers_and_a_scale() -> None:
    linear = nn.Linear(3, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, -2.54, 0.02], [0.0, 0.0, 0.0]]))
    packed = Int8Linear(linear)
    assert packed.weight.tolist() == [[50, -127, 1], [0, 0, 0]]
    torch.testing.assert_close(packed.scale[0], torch.tensor(0.02))
    x = torch.tensor([[2.0, 1.0, 5.0]], requires_grad=True)
    expected = torch.tensor([[2 * 1.0 - 2.54 + 0.1, 0.0]]) + linear.bias
    torch.testing.assert_close(packed(x), expected)
    packed(x)[0, 0].backward()
    torch.testing.assert_close(x.grad, torch.tensor([[1.0, -2.54, 0.02]]))


def test_int8_answers_nearly_as_float32_and_takes_a_quarter(folder: Path) -> None:
    full, small = load(folder), load(folder, quantise="int8")
    layers = [item for item in small.model.modules() if isinstance(item, Int8Linear)]
    assert (
        len(layers) == 2 * 7 and small.model.get_output_embeddings().weight.dtype.is_floating_point
    )
    plain = sum(item.weight.numel() for item in layers)
    assert sum(item.weight.nbytes for item in layers) == plain
    ids = torch.arange(4, 12)[None]
    ours, theirs = (item.logits_from_ids(None, ids, ids > 0) for item in (small, full))
    error = (ours - theirs).norm() / theirs.norm()
    assert 0 < error < 0.05
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() >= 0.8


def test_loss_and_gradients_are_those_of_the_rounded_weights(folder: Path) -> None:
    small, rounded = load(folder, quantise="int8"), load(folder)
    for name, item in small.model.named_modules():
        if isinstance(item, Int8Linear):
            weight = item.weight.float() * item.scale[:, None]
            rounded.model.get_submodule(name).weight.data.copy_(weight)
    found = []
    for language in (small, rounded):
        visual = torch.full((3, 4, 32), 0.1, requires_grad=True)
        total, count = language.loss(visual, QUESTIONS, ANSWERS)
        (total / count).backward()
        assert visual.grad is not None
        found.append((total, visual.grad))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", ["bnb-8bit", "bnb-4bit"])
@pytest.mark.parametrize("package", ["bitsandbytes", "accelerate"])
def test_without_the_package_it_is_one_line(
    folder: Path, bits: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate", reason="the other package is asked for first")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(CloverError, match=rf"{bits} needs the package {package}: pip install"):
        load(folder, quantise=bits)


def dequantised(layer: Any) -> torch.Tensor:
    """Return the weight that a layer of bitsandbytes stands for."""
    import bitsandbytes as bits

    if isinstance(layer, bits.nn.Linear4bit):
        weight: torch.Tensor = bits.functional.dequantize_4bit(
            layer.weight.data, layer.weight.quant_state
        )
        return weight.float()
    values = layer.weight.CB if layer.weight.CB is not None else layer.weight.data
    scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return values.float() * scale[:, None] / 127


@pytest.mark.parametrize(
    ("bits", "rounding", "product"), [("bnb-8bit", 0.02, 0.02), ("bnb-4bit", 0.12, 1e-4)]
)
def test_bitsandbytes_computes_with_the_rounded_weights_and_passes_gradients(
    folder: Path, bits: str, rounding: float, product: float
) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    # Rows of whole blocks of 64: bitsandbytes 0.50.2 rounds narrower ones twice as coarsely where a
    # processor has AVX-512 BF16.
    tiny_llama(width=64, inner=128).model.save_pretrained(folder)
    small, rounded, full = load(folder, quantise=bits), load(folder), load(folder)
    num_layers = 0
    for name, item in small.model.named_modules():
        if type(item).__module__.startswith("bitsandbytes"):
            num_layers += 1
            weight, plain = dequantised(item), rounded.model.get_submodule(name).weight
            assert 0 < relative(weight, plain) < rounding, name
            plain.data.copy_(weight)
            # 8 bits round what they multiply with as well.
            x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0))
            x.requires_grad_()
            found = item(x)
            assert relative(found, x @ weight.T) < product, name
            found.sum().backward()
            assert relative(x.grad, weight.sum(0).expand_as(x)) < product, name
    assert num_layers == 2 * 7, "embeddings and head stay as they are"
    losses = []
    for language in (small, rounded, full):
        visual = torch.full((3, 4, 64), 0.1, requires_grad=True)
        with torch.no_grad():  # an answer before a step must leave it fit to learn through
            language.loss(visual, QUESTIONS, ANSWERS)
        total, count = language.loss(visual, QUESTIONS, ANSWERS)
        total.backward()
        assert visual.grad is not None and bool(visual.grad.abs().max() > 0)
        losses.append(float(total.detach() / count))
    assert losses[0] == pytest.approx(losses[1], rel=2 * product)
    assert losses[0] != pytest.approx(losses[2], rel=1e-6)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


def t5(**settings: object) -> EncoderDecoder:
    language = tiny_t5()
    language.config = language.config.model_copy(update=settings)
    return language


def test_dropout_is_off_unless_the_recipe_asks_for_the_papers() -> None:
    def losses(language: EncoderDecoder) -> list[float]:
        visual = torch.ones(3, 4, 32)
        return [float(language.loss(visual, QUESTIONS, ANSWERS)[0]) for _ in range(3)]

    assert len(set(losses(t5()))) == 1
    published = t5(paper_dropout=True)
    assert len(set(losses(published))) == 3
    assert not any(item.training for item in published.model.modules())
    # An answer is never written with units dropped, nor a loss that only measures.
    with torch.no_grad():
        assert len(set(losses(published))) == 1
    settings = GenerationSettings(max_tokens=5)
    texts = [published.generate(torch.ones(3, 4, 32), QUESTIONS, settings) for _ in range(3)]
    assert texts[0] == texts[1] == texts[2]


def test_the_token_before_the_prompt_is_vicunas(folder: Path) -> None:
    plain, started = load(folder), load(folder, text_start="<eos>", max_instruction_tokens=6)
    ids = plain.text_ids("is there necrosis ?")
    assert started.text_ids("is there necrosis ?") == [1, *ids]
    # A long instruction loses its beginning, never the token before it.
    long = started.text_ids("what tissue is shown in the image ?")
    assert long == [1, *plain.text_ids("what tissue is shown in the image ?")[-5:]]
    with pytest.raises(CloverError, match="text_start 'yes no' is 2 tokens"):
        load(folder, text_start="yes no")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "tensors are missing, for instance"),
        ("cut off", "cannot read the weights in"),
        ("other width", "layers.1.mlp.up_proj.weight is [48, 31], it wants [48, 32]"),
        ("unknown", "knows no model_type 'llamma'; did you mean 'llama'?"),
        ("pickle", "safetensors are read, pickles are not"),
    ],
)
def test_a_damaged_language_model_is_one_line(folder: Path, damage: str, words: str) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    state = load_file(str(path))
    if damage == "missing":
        del state["model.layers.1.mlp.up_proj.weight"]
    elif damage == "other width":
        state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(48, 31)
    save_file(state, str(path), metadata={"format": "pt"})
    if damage == "unknown":
        config = folder / "config.json"
        config.write_text(config.read_text().replace('"llama"', '"llamma"'))
    if damage == "cut off":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "pickle":
        path.unlink()
        torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(CloverError) as error:
        load(folder)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_tensor_without_a_place_is_named_and_left_out(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    state = load_file(str(path)) | {"model.layers.7.mlp.up_proj.weight": torch.zeros(48, 32)}
    save_file(state, str(path), metadata={"format": "pt"})
    load(folder)
    assert "1 tensors that its config.json has no place for" in caplog.text
    assert "model.layers.7.mlp.up_proj.weight" in caplog.text
