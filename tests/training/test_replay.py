"""What a GPU's way of training does, as far as it can be seen without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clover.align.objective import AlignObjective
from clover.core.errors import CloverError
from clover.core.run import RunFolder
from clover.model import build_bridge, load_tokenizer
from clover.training import loop
from clover.training.device import choose_device
from clover.training.loop import TrainingJob, train
from clover.tune import objective as tune_objective
from clover.tune.objective import KeptSpelling, TuneObjective
from clover.vision.dataset import FeatureSet, load_feature_set
from clover.vision.encoder import load_encoder
from tiny import Tiny, tiny_clover, tiny_recipe


class Passed:
    """Stands for `Replay`: the function itself, and how often it ran."""

    calls = 0

    def __init__(self, function: Callable[..., dict[str, Tensor]]) -> None:
        self._function = function

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        Passed.calls += 1
        return self._function(*inputs)


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have stage 2 go a GPU's way, of which only the recording is left out."""
    monkeypatch.setattr(tune_objective, "Replay", Passed)
    monkeypatch.setattr(TuneObjective, "_can_be_replayed", property(lambda _: True))
    Passed.calls = 0


def questions(tiny: Tiny, folder: Path, model: Any) -> FeatureSet:
    return load_feature_set(
        tiny.instructions, needs="question", encoder=model.encoder, cache=folder / "cache"
    )


def gradients(model: Any) -> dict[str, Tensor]:
    found = {
        name: item.grad.clone()
        for name, item in model.bridge.named_parameters()
        if item.grad is not None
    }
    model.bridge.zero_grad()
    return found


@pytest.mark.usefixtures("replayed")
def test_loss_and_gradients_are_those_of_the_plain_way(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny_clover(tiny_recipe(tiny.folder, qformer={"dropout": 0.0}))
    model.bridge.train()
    objective = TuneObjective(model, questions(tiny, tmp_path, model))
    batch = objective.collate([0, 3, 5, 2, 9])
    found = objective.losses(batch)
    assert Passed.calls == 1 and found.is_backward_done
    slopes = gradients(model)
    total, count = model.loss(batch.features, batch.questions, batch.answers)
    total.backward()  # type: ignore[no-untyped-call]
    wanted = gradients(model)
    assert found.sum.item() == pytest.approx(total.item(), rel=1e-5)
    assert found.count.item() == count.item()
    assert slopes.keys() == wanted.keys()
    for name, slope in wanted.items():
        torch.testing.assert_close(slopes[name], slope, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.usefixtures("replayed")
def test_a_loss_that_is_kept_beside_the_language_models_is_not_lost(
    tiny: Tiny, tmp_path: Path
) -> None:
    model = tiny_clover(tiny.recipe)
    objective = TuneObjective(model, questions(tiny, tmp_path, model))
    # `ground` sets it on an objective that is there already.
    objective.kept = KeptSpelling(lambda _: True, lambda *_: torch.tensor(1000.0), weight=3.0)
    found = objective.losses(objective.collate([0, 1]))
    assert found.sum.item() > 3000 and not found.is_backward_done


@pytest.mark.parametrize("bad", [0, 3, 11])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_looked_at_later_changes_no_weight_from_its_step_on(
    bad: int, accumulate: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "is_on_one_gpu", lambda _: True)
    steps = {"steps": 20, "learning_rate": 1e-2, "warmup_steps": 0, "batch_size": 4}
    recipe = tiny_recipe(tiny.folder, tune={**steps, "accumulate": accumulate})
    model = tiny_clover(recipe)
    objective = TuneObjective(model, questions(tiny, tmp_path, model))
    collate, states, spoilt = objective.collate, [], []

    def spoil(indices: Any) -> Any:
        batch = collate(indices)
        if len(states) % accumulate == 0:
            states.append({n: item.clone() for n, item in model.bridge.state_dict().items()})
        else:
            states.append(states[-1])
        if len(states) - 1 == bad * accumulate:
            spoilt.extend(objective.names(indices))
            batch.features.fill_(torch.nan)
        return batch

    objective.collate = spoil  # type: ignore[method-assign]
    job = TrainingJob("tune", recipe.tune, RunFolder(tmp_path / "run"), model.device, 0, "key")
    with pytest.raises(
        CloverError, match=f"tune: the loss of step {bad} is nan; its samples are"
    ) as error:
        train(objective, job)
    assert all(name in str(error.value) for name in spoilt)
    for name, item in model.bridge.state_dict().items():
        assert torch.equal(item, states[bad * accumulate][name]), name
    assert len(states) > (bad + 1) * accumulate, "it was looked at at once"
    assert not list((tmp_path / "run").glob(f"checkpoints/tune/*{bad + 1}*"))


def test_captions_have_few_widths_where_they_are_compiled(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny.folder, align={"compile": True})
    encoder, tokenizer = load_encoder(recipe.encoder), load_tokenizer(recipe)
    data = load_feature_set(tiny.captions, needs="caption", encoder=encoder, cache=tmp_path)
    bridge = build_bridge(recipe, encoder, tokenizer, has_alignment=True)
    objective = AlignObjective(bridge, data, tokenizer, recipe.align, choose_device("cpu"))
    _, text = objective.collate([0, 1, 2])
    assert text.ids.shape[1] == recipe.align.max_text_tokens
    short = text.mask.sum(dim=1).max()
    assert short < text.ids.shape[1] and not text.mask[:, short:].any()


def test_compiling_and_computing_again_are_one_line(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tiny.folder, align={"compile": True}, qformer={"checkpoint_activations": True}
    )
    encoder, tokenizer = load_encoder(recipe.encoder), load_tokenizer(recipe)
    data = load_feature_set(tiny.captions, needs="caption", encoder=encoder, cache=tmp_path)
    bridge = build_bridge(recipe, encoder, tokenizer, has_alignment=True)
    with pytest.raises(CloverError, match=r"compile: true does not go with qformer\.checkpoint"):
        AlignObjective(bridge, data, tokenizer, recipe.align, choose_device("cpu"))
