"""What is computed on a GPU is what a CPU computes, however it is started there.

Skipped where there is none: continuous integration has none. docs/benchmarks.md says where these
ran last.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clover.align.apart import backward_apart
from clover.align.losses import LossSettings
from clover.align.match import Negatives
from clover.align.objective import AlignObjective
from clover.core.config import EncoderConfig, QFormerConfig
from clover.core.errors import CloverError
from clover.core.run import RunFolder
from clover.model import build_bridge, load, load_frozen_language, load_tokenizer
from clover.qformer.bridge import Bridge
from clover.qformer.tokenizer import Tokens
from clover.training.device import Device, choose_device
from clover.training.loop import TrainingJob, train
from clover.training.replay import Replay
from clover.tune.objective import TuneObjective
from clover.vision.cache import FeatureCache
from clover.vision.dataset import load_feature_set
from clover.vision.encoder import load_encoder
from clover.vision.hashes import sha256_file
from stage import STAGES, Stage, run_stage
from tiny import Tiny, tiny_clover, tiny_recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
GPU = torch.device("cuda")
SMALL = QFormerConfig(
    hidden_size=64,
    num_layers=4,
    num_heads=4,
    intermediate_size=96,
    encoder_width=48,
    num_queries=8,
    vocab_size=200,
    dropout=0.0,
)


def losses_and_gradients(
    bridge: Bridge, device: Device, *, ragged: bool
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(6, 17, 48, generator=generator)
    ids = torch.randint(5, 190, (6, 9), generator=generator)
    mask = torch.ones_like(ids)
    if ragged:
        mask[1, 4:], mask[2, 7:], mask[5, 2:] = 0, 0, 0
    negatives = Negatives(torch.tensor([1, 2, 3, 4, 5, 0]), torch.tensor([5, 0, 1, 2, 3, 4]))
    bridge = bridge.to(device.device).train()
    bridge.zero_grad()
    with device.autocast():
        found = backward_apart(
            bridge,
            features.to(device.device),
            Tokens(ids.to(device.device), mask.to(device.device)),
            LossSettings(199),
            negatives=Negatives(
                negatives.image_for_text.to(device.device),
                negatives.text_for_image.to(device.device),
            ),
        )
    # Copies: a module that is moved takes its gradients along.
    gradients = {
        name: item.grad.cpu().clone()
        for name, item in bridge.named_parameters()
        if item.grad is not None
    }
    return {name: value.item() for name, value in found.parts.items()}, gradients


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("numbers", "limit"), [("float32", 2e-4), ("bfloat16", 5e-2)])
def test_stage_1_has_the_losses_and_gradients_of_a_cpu(
    numbers: str, limit: float, ragged: bool
) -> None:
    torch.manual_seed(0)
    bridge = Bridge(SMALL, has_alignment=True)
    wanted, slopes = losses_and_gradients(bridge, choose_device("cpu", "float32"), ragged=ragged)
    found, gradients = losses_and_gradients(
        bridge,
        Device(GPU, getattr(torch, numbers)),
        ragged=ragged,
    )
    assert found == pytest.approx(wanted, rel=limit)
    assert gradients.keys() == slopes.keys()
    for name, slope in slopes.items():
        # A key's bias changes no attention: its gradient is rounding.
        if slope.norm() > 1e-5:
            assert (gradients[name] - slope).norm() / slope.norm() < 2 * limit, name


def test_a_replayed_function_adds_gradients_and_draws_new_numbers() -> None:
    layer = torch.nn.Linear(4, 3, device=GPU)

    def run(x: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = torch.nn.functional.dropout(layer(x), 0.5).sum()
        loss.backward()
        return {"loss": loss.detach()}

    replay = Replay(run)
    torch.manual_seed(0)
    x = torch.randn(5, 4, device=GPU)
    found = []
    sums = []
    for _ in range(5):
        found.append(replay(x)["loss"].item())
        assert layer.weight.grad is not None
        sums.append(layer.weight.grad.sum().item())
    assert len(set(found)) == 5, "dropout repeats itself"
    assert len(set(sums)) == 5, "gradients are not added"
    wanted = layer(x * 2)
    torch.manual_seed(1)
    plain = torch.nn.functional.dropout(wanted, 0.5).sum().item()
    torch.manual_seed(1)
    assert replay(x * 2)["loss"].item() == pytest.approx(plain, rel=1e-5), "not the same numbers"


def test_what_cannot_be_recorded_runs_plainly(caplog: pytest.LogCaptureFixture) -> None:
    layer = torch.nn.Linear(4, 3, device=GPU)

    def run(x: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = torch.nn.functional.dropout(layer(x), 0.5).float().sum()
        assert loss.item() == loss.item()  # waits
        loss.backward()
        return {"loss": loss.detach()}

    replay, x = Replay(run), torch.ones(5, 4, device=GPU)
    found = []
    for _ in range(4):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            found.append(replay(x)["loss"].item())
    assert len(set(found)) > 1 and all(abs(value) < 1000 for value in found)
    assert caplog.text.count("kernels are started one by one") == 1


def weights_of(stage: Stage, tiny: Tiny, out: Path, **changes: Any) -> dict[str, torch.Tensor]:
    recipe = tiny_recipe(tiny.folder, **{stage: changes.pop("training", {}), **changes})
    recipe = recipe.model_copy(update={"device": "cuda", "precision": "float32"})
    return load_file(str(run_stage(stage, tiny, out, recipe=recipe)))


@pytest.mark.parametrize("stage", STAGES)
def test_replayed_training_ends_with_the_weights_of_plain_training(
    stage: Stage, tiny: Tiny, tmp_path: Path
) -> None:
    replayed = weights_of(stage, tiny, tmp_path / "a", qformer={"dropout": 0.0})
    plain = weights_of(
        stage, tiny, tmp_path / "b", qformer={"dropout": 0.0}, training={"cuda_graphs": False}
    )
    for name, wanted in plain.items():
        # A key's bias changes no attention: its gradient is rounding, which AdamW makes large.
        if not name.endswith("key.bias"):
            torch.testing.assert_close(replayed[name], wanted, atol=2e-3, rtol=2e-2, msg=name)


@pytest.mark.parametrize("stage", STAGES)
def test_steps_are_replayed_and_warn_of_nothing(
    stage: Stage,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    replays = []
    original = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(1), original(graph))[1]
    )
    weights_of(stage, tiny, tmp_path, training={"steps": 20})
    assert len(replays) >= 10
    assert "kernels are started one by one" not in caplog.text


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_in_parts_goes_on(stage: Stage, tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe.model_copy(update={"device": "cuda", "precision": "float32"})
    whole = load_file(str(run_stage(stage, tiny, tmp_path / "whole", recipe=recipe)))
    run_stage(stage, tiny, tmp_path / "parts", recipe=recipe, max_steps=9)
    parts = load_file(str(run_stage(stage, tiny, tmp_path / "parts", recipe=recipe)))
    same = sum(torch.equal(parts[name], whole[name]) for name in whole)
    print(f"{stage}: {same} of {len(whole)} tensors are the same bit for bit")
    for name, wanted in whole.items():
        if not name.endswith("key.bias"):
            torch.testing.assert_close(parts[name], wanted, atol=2e-3, rtol=2e-2, msg=name)


def test_a_loss_that_is_not_finite_leaves_the_weights_and_names_the_batch(
    tiny: Tiny, tmp_path: Path
) -> None:
    recipe = tiny_recipe(tiny.folder, align={"steps": 12, "learning_rate": 1e-3})
    encoder, tokenizer = load_encoder(recipe.encoder), load_tokenizer(recipe)
    data = load_feature_set(
        tiny.captions, needs="caption", encoder=encoder, cache=tiny.folder / "cache"
    )
    bridge = build_bridge(recipe, encoder, tokenizer, has_alignment=True)
    objective = AlignObjective(bridge, data, tokenizer, recipe.align, choose_device("cuda"))
    collate, states = objective.collate, []

    def spoilt(indices: Any) -> Any:
        states.append({name: item.clone() for name, item in bridge.state_dict().items()})
        features, text = collate(indices)
        return (features * torch.nan if len(states) == 4 else features), text

    objective.collate = spoilt  # type: ignore[method-assign]
    job = TrainingJob("align", recipe.align, RunFolder(tmp_path), objective.device, 0, "key")
    with pytest.raises(CloverError, match=r"align: the loss of step 3 is nan; its samples are c\d"):
        train(objective, job)
    for name, item in bridge.state_dict().items():
        assert torch.equal(item, states[3][name]), name


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "int8"])
def test_the_cache_holds_what_a_cpu_would_write_and_brings_it_back(
    storage: Any, tiny: Tiny, tmp_path: Path
) -> None:
    config = EncoderConfig(kind="eva_clip", model="vit_tiny_14", batch_size=8)
    encoder: Any = load_encoder(config)
    assert encoder.device.type == "cuda"
    paths = sorted((tiny.folder / "data" / "images").glob("*.png"))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    images = {sha256_file(path): path for path in [*paths, broken]}
    cache = FeatureCache(tmp_path / "cache", encoder, storage=storage)
    rejected = cache.fill(images)
    assert [item.source for item in rejected] == [str(broken)]
    digests = [sha256_file(path) for path in paths]
    found = FeatureCache(tmp_path / "cache", encoder, storage=storage).get(digests)
    with torch.no_grad():
        pixels = torch.stack([encoder.prepare(Image.open(path)) for path in paths])
        wanted = encoder.network.cpu()(pixels)
    limit = {"float16": 1e-3, "bfloat16": 1e-2, "int8": 2e-2}[storage]
    assert ((found - wanted).norm() / wanted.norm()).item() < limit


def test_announced_features_come_to_the_gpu_as_they_are(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe
    encoder = load_encoder(recipe.encoder)
    data = load_feature_set(tiny.captions, needs="caption", encoder=encoder, cache=tmp_path)
    batches = [[0, 5, 3], [7, 1, 2], [9, 9, 4]]
    wanted = [data.features(batch) for batch in batches]
    data.send_to(GPU)
    for batch in batches[:2]:
        data.announce(batch, [0, 0, 0])
    found = [data.features(batch) for batch in batches]
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.is_cuda
        assert torch.equal(mine.cpu(), theirs)


def test_the_question_is_read_alike_by_both_stage_2_losses(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny.folder, qformer={"dropout": 0.0})
    model = tiny_clover(recipe)
    model.device = choose_device("cuda", "float32")
    model.language = load_frozen_language(recipe.language, recipe.prompt, model.device)
    model.bridge.to(GPU).train()
    data = load_feature_set(
        tiny.instructions, needs="question", encoder=model.encoder, cache=tmp_path
    )
    objective = TuneObjective(model, data)
    batch = objective.collate([0, 1, 2, 3, 4])
    replayed = objective.losses(batch)
    assert replayed.is_backward_done
    plain_total, plain_count = model.loss(batch.features, batch.questions, batch.answers)
    assert replayed.sum.item() == pytest.approx(plain_total.item(), rel=1e-4)
    assert replayed.count.item() == plain_count.item()


def test_a_model_trained_on_the_gpu_answers_there(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe.model_copy(update={"device": "cuda"})
    run_stage("tune", tiny, tmp_path, recipe=recipe)
    model = load(tmp_path / "model")
    assert model.device.device.type == "cuda"
    answer = model.ask(tiny.image(), "which tissue is shown ?")
    assert isinstance(answer.text, str)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] > 0
