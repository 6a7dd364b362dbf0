"""The loop's arithmetic: counts, accumulation, schedule, order of the data."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from clover.core.config import OptimizerConfig, load_recipe
from clover.core.errors import CloverError
from clover.training.checkpoint import load_latest, save_checkpoint
from clover.training.device import choose_device
from clover.training.loop import apply_gradients, parameter_groups, train
from clover.training.sampler import Sampler
from clover.training.schedule import learning_rate
from clover.tune.objective import TuneObjective
from clover.vision.dataset import load_feature_set
from line import Line, job_of
from tiny import Tiny, tiny_clover, tiny_recipe


def test_a_loss_that_is_not_finite_stops_and_names_its_samples(tmp_path: Path) -> None:
    objective = Line([1.0, 2.0, float("nan"), 4.0])
    before = objective.module.weight.detach().clone()
    with pytest.raises(CloverError, match=r"the loss of step 0 is nan.*learning_rate") as error:
        train(objective, job_of(tmp_path, batch_size=4))
    named = str(error.value).split("samples are ")[1].split(";")[0]
    assert sorted(named.split(", ")) == [f"record-{index}" for index in range(4)]
    assert torch.equal(objective.module.weight, before)


def test_a_torn_only_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    objective = Line([1.0] * 8)
    optimizer = torch.optim.AdamW(objective.module.parameters())
    path = save_checkpoint(
        tmp_path, step=7, module=objective.module, optimizer=optimizer, key="key"
    )
    load = {"module": objective.module, "optimizer": optimizer, "key": "key"}
    assert load_latest(tmp_path, **load) == 7  # type: ignore[arg-type]
    path.write_bytes(path.read_bytes()[:100])
    assert load_latest(tmp_path, **load) == 0  # type: ignore[arg-type]


def test_only_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    train(Line([1.0] * 8), job_of(tmp_path, steps=9, checkpoint_every=2))
    names = sorted(path.name for path in (tmp_path / "checkpoints" / "line").iterdir())
    assert names == ["step-00000008.pt", "step-00000009.pt"]


def test_accumulating_two_halves_is_the_large_batch_token_by_token(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Plain gradient descent: Adam would blow up rounding where a gradient is nearly zero.
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda groups, lr, **_: torch.optim.SGD(groups, lr=lr)
    )
    data = tmp_path / "vqa.jsonl"
    lines = tiny.instructions.read_text().splitlines()[:8]
    # Answers of very different length: a mean of two means would not be the mean.
    lines = [
        line.replace('"answer": "colon"', '"answer": "the image shows colon with many cells"')
        for line in lines
    ]
    assert sum("many cells" in line for line in lines) in range(1, 8)
    data.write_text("\n".join(lines))
    weights = []
    for accumulate in (1, 2):
        recipe = tiny_recipe(tiny.folder, qformer={"dropout": 0.0})
        model = tiny_clover(recipe)
        found = load_feature_set(
            data,
            needs="question",
            encoder=model.encoder,
            cache=tmp_path / "cache",
            images=tiny.folder / "data",
        )
        # Without clipping, which would hide a wrong scale.
        settings = {"accumulate": accumulate, "learning_rate": 0.05, "clip_norm": None}
        job = job_of(tmp_path / str(accumulate), **settings)
        assert train(TuneObjective(model, found), job)
        weights.append(model.bridge.state_dict())
    for name, large in weights[0].items():
        torch.testing.assert_close(weights[1][name], large, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("clip_norm", [None, 1e-3, 0.5, 1e6])
def test_one_pass_over_gradients_is_division_then_torchs_clipping(clip_norm: float | None) -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    total = torch.tensor(7.0)
    for module in (ours, theirs):
        (module(torch.arange(10.0).view(2, 5)).square().sum()).backward()
    for item in theirs.parameters():
        assert item.grad is not None
        item.grad.div_(total)
    if clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip_norm)
    torch.optim.SGD(theirs.parameters(), lr=1.0).step()
    apply_gradients(torch.optim.SGD(ours.parameters(), lr=1.0), total, clip_norm=clip_norm)
    for found, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert found.grad is None


def test_a_batch_that_accumulation_does_not_divide_is_refused() -> None:
    with pytest.raises(ValidationError, match="does not divide"):
        OptimizerConfig(batch_size=4, accumulate=3)
    with pytest.raises(CloverError, match="accumulate 64 does not divide") as error:
        load_recipe("phantom", ("tune.accumulate=64",))
    assert len(str(error.value)) < 200


def test_frozen_language_model_and_encoder_do_not_learn(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny_clover(tiny.recipe)
    before = {name: item.clone() for name, item in model.language.model.state_dict().items()}  # type: ignore[attr-defined]
    data = load_feature_set(
        tiny.instructions, needs="question", encoder=model.encoder, cache=tiny.folder / "cache"
    )
    start = {name: item.clone() for name, item in model.bridge.state_dict().items()}
    train(TuneObjective(model, data), job_of(tmp_path, learning_rate=0.01))
    after = model.language.model.state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(before[name], after[name]) for name in before)
    changed = [
        n for n, item in model.bridge.state_dict().items() if not torch.equal(item, start[n])
    ]
    assert any("query_feed_forward" in name for name in changed)
    # The last layer's text rows are read by nobody (SPEC, section 4).
    assert not any("layers.1.text_feed_forward.inner.bias" in name for name in changed)


def test_the_schedule_warms_up_linearly_and_ends_the_cosine_at_the_minimum() -> None:
    config = OptimizerConfig(steps=110, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1)
    rates = [learning_rate(config, step) for step in range(111)]
    warm = [later - earlier for earlier, later in itertools.pairwise(rates[:11])]
    assert rates[0] > 0 and max(warm) - min(warm) < 1e-12
    assert rates[10] == max(rates) == 1.0
    assert math.isclose(rates[60], 0.55) and math.isclose(rates[110], 0.1)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))


def test_matrices_decay_and_nothing_else(tiny: Tiny) -> None:
    bridge = tiny_clover(tiny.recipe).bridge
    decayed, kept = parameter_groups(bridge, 0.05)
    names = {id(item): name for name, item in bridge.named_parameters()}
    decayed_names = {names[id(item)] for item in decayed["params"]}  # type: ignore[attr-defined]
    kept_names = {names[id(item)] for item in kept["params"]}  # type: ignore[attr-defined]
    assert decayed_names | kept_names == set(names.values()) and not decayed_names & kept_names
    assert kept["weight_decay"] == 0.0
    assert {"qformer.query_tokens", "vision_norm.weight"} <= kept_names
    assert not any("norm" in name or name.endswith("bias") for name in decayed_names)


@given(
    batches=st.integers(1, 7),
    size=st.integers(1, 6),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 50),
    is_sorted=st.booleans(),
)
def test_every_epoch_shows_every_sample_once(
    batches: int, size: int, epochs: int, seed: int, is_sorted: bool
) -> None:
    total = batches * size
    sizes = [(7 * index) % 5 for index in range(total)] if is_sorted else None
    sampler = Sampler(total, size, seed=seed, sizes=sizes)
    for epoch in range(epochs):
        seen = [i for b in range(batches) for i in sampler.batch(epoch * batches + b)]
        assert sorted(seen) == list(range(total))


@given(total=st.integers(1, 40), size=st.integers(1, 12), index=st.integers(0, 60))
def test_a_batch_is_a_function_of_its_number_alone(total: int, size: int, index: int) -> None:
    walked = Sampler(total, size, seed=3)
    for earlier in range(index):
        walked.batch(earlier)
    jumped = Sampler(total, size, seed=3).batch(index)
    assert walked.batch(index) == jumped
    assert len(set(jumped)) == len(jumped) == min(size, total)


def test_epochs_differ_and_like_lengths_go_together() -> None:
    sizes = [index % 8 for index in range(64)]
    sampler = Sampler(64, 8, seed=0, sizes=sizes)
    epochs = [[sampler.batch(8 * epoch + b) for b in range(8)] for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert all(len({sizes[i] for i in batch}) == 1 for batch in epochs[0])
    assert [sizes[batch[0]] for batch in epochs[0]] != sorted(sizes[b[0]] for b in epochs[0])


def test_a_device_that_is_not_there_is_one_line() -> None:
    with pytest.raises(CloverError, match="device 'quantum' is not usable"):
        choose_device("quantum")
