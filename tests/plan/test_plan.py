"""`clover plan`: the published counts, the arithmetic behind hours and dollars, and the switch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from clover.cli import cli
from clover.core.config import EncoderConfig, Recipe, load_recipe
from clover.core.errors import CloverError
from clover.plan.count import count
from clover.plan.run import Card, Plan, plan
from clover.plan.step import EncoderSize, align_size, encoder_size, tune_size
from clover.vision.token_encoder import describe

# SPEC, section 9, and the language models' own numbers.
FULL = {
    "clover-flant5xl": (187_262_464, 2_849_757_184),
    "clover-vicuna7b": (188_837_376, 6_738_423_808),
}


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def test_a_product_is_counted_to_the_byte_and_to_the_operation() -> None:
    a, b = meta(10, 20), meta(20, 30)

    def call() -> None:
        first = a @ b  # 10 x 30 floats
        second = first @ meta(30, 40)  # that and 30 x 40, and 10 x 40
        del first
        second.sum()

    found = count(call, before=[a, b])
    assert found.operations == 2 * 10 * 20 * 30 + 2 * 10 * 30 * 40
    assert found.peak == 4 * (10 * 30 + 30 * 40 + 10 * 40)


def test_a_backward_pass_is_twice_the_forward_pass() -> None:
    layer, x = nn.Linear(64, 32, device="meta"), meta(8, 64).requires_grad_()
    forward = count(lambda: layer(x), before=[x, *layer.parameters()])
    both = count(lambda: layer(x).sum().backward(), before=[x, *layer.parameters()])
    assert both.operations == 3 * forward.operations == 3 * 2 * 8 * 64 * 32


@pytest.fixture(scope="module")
def eva() -> EncoderSize:
    return encoder_size(load_recipe("clover-vicuna7b").encoder, batch=1)


@pytest.mark.parametrize("name", FULL)
def test_a_step_of_the_full_size_recipe_has_the_published_counts(
    name: str, eva: EncoderSize
) -> None:
    recipe, encoder = load_recipe(name), eva
    assert recipe.encoder == load_recipe("clover-vicuna7b").encoder
    assert (encoder.num_tokens, encoder.width) == (257, 1408)
    # 39 blocks of products of 257 tokens, and the patches (SPEC, 3.1 and 9).
    products = 2 * 257 * 1408 * (4 * 1408 + 2 * 6144) + 4 * 257 * 257 * 1408
    expected = 39 * products + 2 * 256 * 1408 * 588
    assert encoder.image.operations == pytest.approx(expected, rel=1e-3)
    stage_1, stage_2 = align_size(recipe, encoder), tune_size(recipe, encoder)
    assert stage_1.trainable == 186_705_470
    assert (stage_2.trainable, stage_2.frozen) == FULL[name]
    assert stage_2.frozen_weights == pytest.approx(2 * stage_2.frozen, rel=1e-4)  # bfloat16
    assert stage_1.optimiser == 12 * stage_1.trainable
    # The frozen model is passed forward and, for the visual tokens, backward: 4 operations a weight
    # and token, 6 for what learns.
    tokens = recipe.tune.batch_size * (32 + 128 + 256 - 1)
    if name == "clover-vicuna7b":
        assert stage_2.operations > 4 * 6.6e9 * tokens
        assert stage_2.operations < 5 * 6.8e9 * tokens


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("language")
    shape = {"model_type": "llama", "vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 2}
    shape |= {"intermediate_size": 256, "num_attention_heads": 2, "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(shape))
    recipe = Recipe.model_validate(
        {
            "name": "small",
            "precision": "float32",
            "encoder": {"kind": "eva_clip", "model": "vit_tiny_14", "image_size": 56},
            "qformer": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 500},
            "language": {"weights": str(folder)},
            "align": {"steps": 100, "batch_size": 4},
            "tune": {"steps": 50, "batch_size": 4},
        }
    )
    return plan(recipe, Card(memory_gib=80, tflops=0.001, price=3.0), images=1000)


def test_hours_dollars_and_disk_follow_from_the_counts(made: Plan) -> None:
    found = made
    row = found.row()
    assert row["fits"] and row["switch"] is None
    step = found.align.operations / (0.1 * 0.25 * 1e9) + 0.018  # float32: a tenth of the pace
    assert found.hours()["align"] == pytest.approx(step * 100 / 3600)
    assert row["dollars"]["tune"] == pytest.approx(3 * found.hours()["tune"], abs=0.01)
    assert found.cache_gib() == pytest.approx(1000 * 17 * 48 * 2 / 2**30)
    parts = row["tune"]["gib"]
    assert sum(parts.values()) == pytest.approx(row["peak_gib"]["tune"], abs=0.03)


def test_views_number_format_and_grounding_steps_are_counted(made: Plan) -> None:
    def changed(**sections: dict[str, Any]) -> Plan:
        tree = made.recipe.model_dump(mode="json", exclude_unset=True)
        for name, values in sections.items():
            tree[name] = tree[name] | values
        return plan(Recipe.model_validate(tree), made.card, images=made.images)

    views = changed(encoder={"views": 30})
    assert views.cache_gib() == pytest.approx(30 * made.cache_gib())
    assert views.hours()["features"] == pytest.approx(30 * made.hours()["features"])
    assert changed(encoder={"storage": "int8"}).cache_gib() == pytest.approx(
        1000 * 17 * (48 + 4) / 2**30
    )
    steps = {"grounding_steps": 700, "anchoring_steps": 300, "grounding_batch_size": 8}
    grounded = changed(tune=steps)
    one = grounded.tune.operations_before
    assert one > 0 and grounded.tune.operations == made.tune.operations
    more = grounded.hours()["tune"] - made.hours()["tune"]
    assert more == pytest.approx(1000 * (one / (0.1 * 0.54 * 1e9) + 0.009) / 3600)
    # An image's keys are computed once for its questions; most of a step is the questions' own.
    shared = changed(tune=steps | {"grounding_questions": 4}).tune.operations_before
    halved = changed(tune=steps | {"grounding_tokens": 0.5}).tune.operations_before
    assert shared < one and halved < one
    large = changed(tune=steps | {"grounding_batch_size": 4096})
    assert large.peaks()["tune"] > 2 * made.peaks()["tune"]
    parts = large.row()["tune"]["gib"]
    assert sum(parts.values()) == pytest.approx(large.row()["peak_gib"]["tune"], abs=0.03)


MEASURED = {
    ("align", 1.399): 25.1,
    ("align", 6.298): 49.6,
    ("tune", 34.139): 89.0,
    ("tune", 273.917): 648.7,
    ("features", 0.5207): 1000 / 937.7,
}
"""(stage, TFLOP of a step or an image) and its milliseconds on an H200 (docs/benchmarks.md)."""


@pytest.mark.parametrize(("stage", "work"), MEASURED)
def test_a_stage_takes_the_time_that_it_was_measured_to_take(stage: str, work: float) -> None:
    card = Card(memory_gib=139, tflops=790, price=1)
    found = 1000 * card.seconds(stage, work * 1e12)
    assert found == pytest.approx(MEASURED[stage, work], rel=0.05)
    assert 1000 * card.seconds("align", 1.399e12, "float32") == pytest.approx(86.8, rel=0.05)


@pytest.mark.parametrize("name", ["clover-flant5xl", "clover-vicuna7b", "modern"])
def test_the_documented_peaks_are_those_that_the_command_prints(name: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    recipe = load_recipe(name)
    encoder = encoder_size(recipe.encoder, batch=1)
    for cell, size in zip(row.split("|")[2:4], (align_size, tune_size), strict=True):
        assert cell.strip() == f"{size(recipe, encoder).peak / 2**30:.1f} GiB"


def test_a_tower_of_open_clip_is_planned_and_a_convolutional_one_is_one_line() -> None:
    pytest.importorskip("open_clip", reason="the extra [open-clip] is not installed")
    config = EncoderConfig(kind="open_clip", model="ViT-S-16")
    found = encoder_size(config, batch=1)
    assert (found.num_tokens, found.width) == (197, 384) and found.image.operations > 8e9
    assert describe(config)["width"] == 384
    with pytest.raises(CloverError, match="RN50 is convolutional and keeps no tokens"):
        encoder_size(config.model_copy(update={"model": "RN50"}), batch=1)


def test_the_switch_that_is_named_makes_it_fit(made: Plan) -> None:
    found = made
    limit = 0.7 * max(found.peaks().values())
    card = Card(memory_gib=limit, tflops=1, price=1)
    tight = plan(found.recipe, card, images=10)
    assert not tight.fits and tight.switch
    changes = tight.switch.replace("--set ", "").split()
    tree = found.recipe.model_dump(mode="json")
    for change in changes:
        key, value = change.split("=")
        section, name = key.split(".")
        tree[section][name] = value if name == "quantise" else int(value)
    mended = plan(Recipe.model_validate(tree), card, images=10)
    assert mended.fits
    hopeless = plan(found.recipe, Card(memory_gib=0.001, tflops=1, price=1), images=10)
    assert not hopeless.fits and hopeless.switch is None


def test_four_bits_take_what_bitsandbytes_takes(made: Plan) -> None:
    recipe = made.recipe.model_copy(update={"precision": "auto"})
    encoder = encoder_size(recipe.encoder, batch=1)
    language = recipe.language.model_copy(update={"quantise": "bnb-4bit"})
    small = tune_size(recipe.model_copy(update={"language": language}), encoder)
    # Two layers of 4 * 64 * 64 + 3 * 64 * 256 values: half a byte, a byte for 64, 4 for 64 * 256.
    count = 2 * (4 * 64 * 64 + 3 * 64 * 256)
    words = 2 * 500 * 64 * 2 + 5 * 64 * 2  # embeddings, head and norms stay as they are
    rest = small.frozen_weights - words - count // 2 - count // 64
    assert 0 <= rest < 300
    assert small.frozen_numbers == "bnb-4bit, the rest bfloat16"
    # Products are of as many operations as before.
    assert small.operations == tune_size(recipe, encoder).operations


def test_a_batch_in_chunks_takes_less_memory_and_a_little_more_work(made: Plan) -> None:
    recipe = made.recipe
    encoder = encoder_size(recipe.encoder, batch=1)
    align = recipe.align.model_copy(update={"batch_size": 8})
    whole, chunked = (
        align_size(recipe.model_copy(update={"align": config}), encoder)
        for config in (align, align.model_copy(update={"gradient_chunk": 2}))
    )
    features = 8 * encoder.num_tokens * encoder.width * 4
    assert features < chunked.activations < 0.5 * whole.activations
    # Image pass and text pass forward once more: 2 of the step's 9 rows, of a third of its work.
    assert 1.04 < chunked.operations / whole.operations < 1.2
    mended = plan(
        recipe.model_copy(update={"align": align}),
        Card(memory_gib=0.9 * whole.peak / 2**30, tflops=1, price=1),
        images=10,
    )
    assert mended.switch is not None and "align.gradient_chunk=4" in mended.switch
    # Sums of parts, which a single process refuses, are named away.
    summed = recipe.model_copy(update={"align": align.model_copy(update={"accumulate": 2})})
    limit = 0.95 * align_size(summed, encoder).peak / 2**30
    refused = plan(summed, Card(memory_gib=limit, tflops=1, price=1), images=10)
    assert not refused.fits
    assert "--set align.accumulate=1 --set align.gradient_chunk=2" in str(refused.switch)


def test_eight_bits_halve_the_frozen_weights_of_a_planned_model(made: Plan) -> None:
    recipe = made.recipe.model_copy(update={"precision": "auto"})
    encoder = encoder_size(recipe.encoder, batch=1)
    language = recipe.language.model_copy(update={"quantise": "int8"})
    full = tune_size(recipe, encoder)
    small = tune_size(recipe.model_copy(update={"language": language}), encoder)
    words = 2 * 500 * 64 * 2  # embeddings and head stay as they are
    ratio = (small.frozen_weights - words) / (full.frozen_weights - words)
    assert 0.49 < ratio < 0.53


def test_the_command_prints_a_table_or_one_json_object() -> None:
    arguments = ["plan", "phantom", "--gpu", "8", "--price", "1"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    assert "peak, GiB" in done.output and "It fits 8 GiB." in done.output
    assert "image encoder   timm/tf_efficientnet_lite0" in done.output
    assert "SmolLM2-135M-Instruct.Q4_1.gguf, 134,515,008 parameters, bfloat16" in done.output
    widths = {len(line) for line in done.output.splitlines()[4:16]}
    assert widths == {26 + 3 * 14}, "columns stand under each other"
    row = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).output)
    assert row["recipe"] == "clover-phantom" and row["tune"]["trainable_parameters"] > 19e6


def test_a_language_model_of_unknown_shape_and_a_card_of_nothing_are_one_line(made: Plan) -> None:
    recipe = made.recipe
    language = recipe.language.model_copy(update={"weights": "hf://org/unheard-of@main"})
    with pytest.raises(CloverError, match=r"shape of language\.weights .* is not known: fetch it"):
        tune_size(
            recipe.model_copy(update={"language": language}),
            encoder_size(EncoderConfig(kind="tiny"), batch=1),
        )
    done = CliRunner().invoke(cli, ["plan", "phantom", "--gpu", "0"])
    assert done.exit_code == 2 and "'--gpu': 0.0 is not in the range x>0" in done.output


@pytest.mark.parametrize("option", ["--gpu", "--price", "--tflops"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_what_is_no_number_of_a_card_is_named(option: str, value: str) -> None:
    done = CliRunner().invoke(cli, ["plan", "phantom", option, value])
    assert done.exit_code == 2 and f"Invalid value for '{option}'" in done.output
