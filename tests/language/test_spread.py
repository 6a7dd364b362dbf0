"""A language model spread over two processes: half the layers' bytes, the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from clover.core.errors import CloverError
from clover.core.files import read_json
from clover.core.run import RunFolder
from clover.language.spread import spread_layers
from clover.model import load
from clover.tune.run import tune
from tiny import Tiny, tiny_recipe
from together import run_together

from .tiny import tiny_llama, tiny_t5

pytestmark = pytest.mark.alone  # forks

QUESTIONS = ["is there necrosis ?", "what tissue is shown ?", "describe the image ."]
ANSWERS = ["yes", "colon with keratin", "lymph node with moderate fibrosis and many cells"]


def loss_of(model: Any, rank: int) -> tuple[Tensor, Tensor]:
    """Return the loss of one to two rows, other ones in each process, and the image's gradient."""
    rows = slice(0, 2) if rank == 0 else slice(2, 3)
    random = torch.Generator().manual_seed(rank)
    visual = torch.randn(len(QUESTIONS[rows]), 4, 32, generator=random, requires_grad=True)
    total, _ = model.loss(visual, QUESTIONS[rows], ANSWERS[rows])
    total.backward()
    assert visual.grad is not None
    return total.detach(), visual.grad


@pytest.mark.parametrize("build", [tiny_llama, tiny_t5])
def test_a_spread_model_gives_the_loss_and_the_gradient_of_a_whole_one(
    build: Any, tmp_path: Path
) -> None:
    def work(rank: int) -> tuple[list[tuple[Tensor, Tensor]], int, int]:
        model = build()
        spread_layers(model.model, torch.device("cpu"))
        found = [loss_of(model, rank) for _ in range(2)]  # once more: taken apart, put together
        spread = [item for item in model.model.parameters() if hasattr(item, "to_local")]
        held = sum(item.to_local().numel() for item in spread)
        whole = sum(item.numel() for item in spread)
        assert not any(item.requires_grad for item in model.model.parameters())
        return found, held, whole

    for rank, (found, held, whole) in enumerate(run_together(work, tmp_path)):
        loss, gradient = loss_of(build(), rank)
        for ours, slope in found:
            torch.testing.assert_close(ours, loss, atol=1e-5, rtol=0)
            torch.testing.assert_close(slope, gradient, atol=1e-5, rtol=0)
        assert whole > 0 and held == pytest.approx(whole / 2, rel=0.05)


def test_stage_2_through_a_spread_model_ends_at_the_weights_through_a_whole_one(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Plain gradient descent: Adam would blow up rounding where a gradient is nearly zero.
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda groups, lr, **_: torch.optim.SGD(groups, lr=lr)
    )

    def run(is_spread: bool) -> str:
        settings = {"steps": 4, "batch_size": 8, "learning_rate": 0.02, "validate_every": 2}
        recipe = tiny_recipe(
            tiny.folder,
            qformer={"dropout": 0.0},
            tune=settings,
            language={"spread": is_spread},
        )
        out = tmp_path / str(is_spread)
        tune(
            recipe,
            instructions=tiny.instructions,
            out=out,
            run=tmp_path / f"run-{is_spread}",
            cache=tiny.folder / "cache",
            validation=tiny.instructions,
        )
        return str(out)

    run_together(lambda _: run(True), tmp_path / "said")
    run(False)
    ours, theirs = (
        load_file(str(tmp_path / name / "bridge.safetensors")) for name in ("True", "False")
    )
    for name, item in theirs.items():
        torch.testing.assert_close(ours[name], item, atol=1e-5, rtol=0, msg=name)
    assert read_json(tmp_path / "True" / "config.json")["recipe"]["language"]["spread"] is True
    # Every process measures, since each pass is one of all; the first one writes.
    rows, wanted = (
        RunFolder(tmp_path / f"run-{name}").metrics("tune-validation") for name in (True, False)
    )
    assert [row["step"] for row in rows] == [2, 4]
    for row, other in zip(rows, wanted, strict=True):
        assert row["answer_loss"] == pytest.approx(other["answer_loss"], abs=3e-5)
    # One process holds it whole again.
    assert load(tmp_path / "True").ask(tiny.image(), "which tissue is shown ?").text is not None


def test_a_quantised_model_is_not_spread(tiny: Tiny, tmp_path: Path) -> None:
    def work(_: int) -> str:
        recipe = tiny_recipe(tiny.folder, language={"spread": True, "quantise": "int8"})
        with pytest.raises(CloverError) as error:
            tune(
                recipe,
                instructions=tiny.instructions,
                out=tmp_path / "model",
                run=tmp_path / "run",
                cache=tiny.folder / "cache",
            )
        return str(error.value)

    said = run_together(work, tmp_path / "said")[0]
    assert "does not go with language.quantise=int8" in said and "\n" not in said


def test_a_model_whose_layers_are_not_named_is_refused() -> None:
    model = tiny_llama().model
    model._no_split_modules = None
    with pytest.raises(CloverError, match="names no layers of a llama model"):
        spread_layers(model, torch.device("cpu"))
