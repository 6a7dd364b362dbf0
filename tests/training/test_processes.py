"""Several processes are one: same weights, any number after a stop, and none is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from clover.align.contrast import Similarity
from clover.align.match import Negatives, negative_weights
from clover.core.config import Recipe
from clover.core.errors import CloverError
from clover.core.run import RunFolder
from clover.training import processes
from clover.training.loop import train
from line import Line, job_of
from stage import STAGES, Stage, run_stage
from tiny import Tiny, tiny_recipe
from together import environment, free_port, run_together, start_together

pytestmark = pytest.mark.alone  # forks

PLAIN = {"steps": 6, "batch_size": 8, "checkpoint_every": 3, "learning_rate": 0.02}


def likeliest(similar: Similarity, *, offset: int = 0, ignored: Tensor | None = None) -> Negatives:
    """Choose negatives without chance, which every split of a batch would draw otherwise."""
    to_image, to_text = negative_weights(similar, offset=offset, ignored=ignored)
    return Negatives(to_image.argmax(dim=1), to_text.argmax(dim=1))


@pytest.fixture
def plain_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    """No chance, and no Adam: it would blow up rounding where a gradient is nearly zero."""
    monkeypatch.setattr("clover.align.losses.sample_negatives", likeliest)
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda groups, lr, **_: torch.optim.SGD(groups, lr=lr)
    )


def plain_recipe(tiny: Tiny, **settings: Any) -> Recipe:
    values = {**PLAIN, **settings}
    # Without clipping, which would hide a wrong scale.
    values["clip_norm"] = None
    return tiny_recipe(tiny.folder, qformer={"dropout": 0.0}, align=values, tune=values)


def assert_same_weights(found: Path, wanted: Path) -> None:
    ours, theirs = load_file(str(found)), load_file(str(wanted))
    assert ours.keys() == theirs.keys()
    for name, item in theirs.items():
        torch.testing.assert_close(ours[name], item, atol=1e-5, rtol=0, msg=name)


# One process refuses sums of parts in stage 1: they are not the losses of its batch.
@pytest.mark.parametrize(("stage", "accumulate"), [("align", 1), ("tune", 1), ("tune", 2)])
def test_two_processes_train_to_the_weights_of_one(
    stage: Stage, accumulate: int, tiny: Tiny, tmp_path: Path, plain_descent: None
) -> None:
    recipe = plain_recipe(tiny, accumulate=accumulate)
    alone = run_stage(stage, tiny, tmp_path / "alone", recipe=recipe)
    both = tmp_path / "both"
    run_together(lambda rank: str(run_stage(stage, tiny, both, recipe=recipe)), tmp_path / "said")
    found = both / alone.relative_to(tmp_path / "alone")
    assert_same_weights(found, alone)
    # It has learnt: equal weights that never moved would prove nothing.
    still = run_stage(
        stage, tiny, tmp_path / "still", recipe=plain_recipe(tiny, learning_rate=1e-12)
    )
    moved = [
        float((item - load_file(str(still))[name]).abs().max())
        for name, item in load_file(str(alone)).items()
    ]
    assert max(moved) > 3e-3
    # One process wrote, of all: each step once, with the losses of the whole batch.
    ours, theirs = (RunFolder(path).metrics(stage) for path in (both, tmp_path / "alone"))
    assert len((both / "metrics.jsonl").read_text().splitlines()) == len(ours) == len(theirs) == 1
    for name in {"loss", "contrast", "match", "caption"} & set(theirs[0]):
        assert ours[0][name] == pytest.approx(theirs[0][name], abs=2e-5), name


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_where_the_first_stopped(
    sizes: tuple[int, int], stage: Stage, tiny: Tiny, tmp_path: Path, plain_descent: None
) -> None:
    recipe = plain_recipe(tiny)
    alone = run_stage(stage, tiny, tmp_path / "alone", recipe=recipe)
    out = tmp_path / "changed"
    for size, stop in zip(sizes, (3, None), strict=True):
        work: Callable[[int], str] = lambda _, stop=stop: str(  # noqa: E731
            run_stage(stage, tiny, out, recipe=recipe, max_steps=stop)
        )
        if size == 1:
            work(0)
        else:
            run_together(work, tmp_path / f"said-{size}", size=size)
    assert_same_weights(out / alone.relative_to(tmp_path / "alone"), alone)


def test_two_processes_in_parts_give_the_weights_of_two_in_one_go(
    tiny: Tiny, tmp_path: Path
) -> None:
    # Dropout and drawn negatives are on: each process goes on with its own random numbers.
    recipe = tiny_recipe(tiny.folder, align={"steps": 8, "batch_size": 4, "checkpoint_every": 3})

    def run(out: Path, stop: int | None, said: str) -> None:
        run_together(
            lambda _: str(run_stage("align", tiny, out, recipe=recipe, max_steps=stop)),
            tmp_path / said,
        )

    run(tmp_path / "whole", None, "1")
    run(tmp_path / "parts", 5, "2")
    run(tmp_path / "parts", None, "3")
    whole, parts = (tmp_path / name / "align.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_dropout_differs_between_processes_and_the_first_draws_as_if_alone(tmp_path: Path) -> None:
    from clover.core.run import seed_everything
    from clover.training.checkpoint import start_own_random

    def work(_: int) -> Tensor:
        seed_everything(7)
        start_own_random()
        return torch.rand(8)

    first, second, third = run_together(work, tmp_path, size=3)
    assert torch.equal(first, work(0))
    assert len({tuple(item.tolist()) for item in (first, second, third)}) == 3


def test_a_batch_that_processes_cannot_share_is_one_line(tiny: Tiny, tmp_path: Path) -> None:
    def work(_: int) -> str:
        recipe = tiny_recipe(tiny.folder, align={"batch_size": 7})
        with pytest.raises(CloverError) as error:
            run_stage("align", tiny, tmp_path / "run", recipe=recipe)
        return str(error.value)

    said = run_together(work, tmp_path / "said")
    wanted = "align: 2 processes cannot share 7 samples a pass equally"
    assert said[0].startswith(wanted) and said[0].endswith("of 6 or 8") and "\n" not in said[0]


def test_processes_that_see_different_files_say_so(tmp_path: Path) -> None:
    def work(rank: int) -> str:
        processes.check_same("checkpoints", 5)
        with pytest.raises(CloverError, match="2 processes find different checkpoints") as error:
            processes.check_same("checkpoints", rank)
        return str(error.value)

    assert "a disk that all machines see" in run_together(work, tmp_path)[0]


def test_a_gradient_that_one_process_lacks_is_summed_and_one_that_all_lack_stays_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_BUCKET", 5)  # several messages

    def work(rank: int) -> list[Tensor | None]:
        items = [torch.zeros(3, requires_grad=True) for _ in range(4)]
        for place, item in enumerate(items[:3]):
            if (place, rank) != (1, 0):
                item.grad = torch.full((3,), 10.0**place * (rank + 1))
        processes.sum_gradients(items)
        return [item.grad for item in items]

    for found in run_together(work, tmp_path):
        assert [None if item is None else item.tolist() for item in found] == [
            [3.0] * 3, [20.0] * 3, [300.0] * 3, None
        ]  # fmt: skip


def test_a_loss_that_is_not_finite_in_one_process_is_said_by_that_one_alone(tmp_path: Path) -> None:
    objective = Line([1.0, 2.0, 3.0, float("nan")])

    def work(_: int) -> None:
        train(objective, job_of(tmp_path / "run", batch_size=4))

    codes, errors = start_together(work, tmp_path / "said")
    # The others leave with the code of a user's mistake; who raises is seen by `clover.cli`.
    assert sorted(codes) == [1, 2] and len(errors) == 1
    assert re.search(r"the loss of step 0 is nan; its samples are record-\d, record-\d", errors[0])
    assert "record-3" in errors[0]


def start(
    tiny: Tiny, folder: Path, out: Path, *, size: int = 2, **extra: str
) -> list[subprocess.Popen[str]]:
    """Start `clover align` in several processes, as `torchrun` would."""
    recipe = tiny_recipe(
        tiny.folder, align={"steps": 400, "checkpoint_every": 5, "learning_rate": 1e-3}
    )
    (folder / "tiny.yaml").write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "clover", "align", "--recipe", str(folder / "tiny.yaml")]
    command += ["--data", str(tiny.captions), "--out", str(out)]
    command += ["--features", str(tiny.folder / "cache")]
    port = free_port()
    return [
        subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment(rank, size, port), **extra, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(size)
    ]


def wait_for_save(running: list[subprocess.Popen[str]], out: Path) -> None:
    deadline = time.monotonic() + 120
    while not list((out / "checkpoints" / "align").glob("step-*.pt")):
        assert all(process.poll() is None for process in running), running[0].communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def said_by(running: list[subprocess.Popen[str]]) -> list[str]:
    """Return what the processes wrote to stderr, all of them, line by line."""
    return [line for process in running for line in process.communicate(timeout=120)[1].splitlines()
            if line.startswith("clover:")]  # fmt: skip


@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_that_dies_ends_the_others_with_one_line(
    dies: int, tiny: Tiny, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    running = start(tiny, tmp_path, out)
    wait_for_save(running, out)
    running[dies].kill()
    said = said_by(running)
    assert running[1 - dies].returncode == 2
    assert len(said) == 1 and "one of the 2 processes of this training ended" in said[0], said
    assert list((out / "checkpoints" / "align").glob("step-*.pt"))


def test_a_process_that_hangs_is_given_up_after_the_patience(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    running = start(tiny, tmp_path, out, CLOVER_PATIENCE_S="5")
    wait_for_save(running, out)
    running[1].send_signal(signal.SIGSTOP)
    try:
        said = said_by(running[:1])
        assert running[0].returncode == 2 and len(said) == 1 and "did not answer for 5 s" in said[0]
    finally:
        running[1].kill()
        running[1].communicate()


def test_sigterm_to_one_process_saves_and_stops_all(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    running = start(tiny, tmp_path, out)
    wait_for_save(running, out)
    running[1].send_signal(signal.SIGTERM)
    time.sleep(0.05)
    running[1].send_signal(signal.SIGTERM)  # Slurm and torchrun both tell it
    said = said_by(running)
    assert [process.returncode for process in running] == [130, 130]
    assert len(said) == 1 and "continues" in said[0]
    newest = max((out / "checkpoints" / "align").glob("step-*.pt"))
    state = torch.load(newest, weights_only=True)
    assert len(state["random_others"]) == 1 and 0 < state["step"] < 400


@pytest.mark.parametrize("verb", [["demo"], ["tune", "--shots", "1", "--from", "m", "--data", "d"]])
def test_what_runs_in_one_process_refuses_several_with_one_line(
    verb: list[str], tmp_path: Path
) -> None:
    port = free_port()
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "clover", *verb, "--out", str(tmp_path / "out")],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment(rank, 2, port), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    said = said_by(running)
    assert [process.returncode for process in running] == [2, 2]
    assert len(said) == 1 and "runs in one process; start it without torchrun" in said[0]
    assert not (tmp_path / "out").exists()


def test_a_process_that_fails_late_still_finds_who_failed_first(tmp_path: Path) -> None:
    # The first process holds the store that the second asks; it would have been gone by then.
    late = """
import sys, time
from clover.core.errors import CloverError
from clover.training.processes import joined, rank
try:
    with joined("cpu"):
        time.sleep(1.5 * rank())
        raise CloverError("clover: no")
except CloverError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""
    port = free_port()
    running = [
        subprocess.Popen(
            [sys.executable, "-c", late],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment(rank, 2, port), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    assert said_by(running) == ["clover: no"]
    assert [process.returncode for process in running] == [2, 2]


def test_an_environment_that_names_no_others_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", "0")
    with (
        pytest.raises(CloverError, match=r"WORLD_SIZE is 2, but .*MASTER_ADDR.*torchrun"),
        processes.joined("cpu"),
    ):
        pass
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(CloverError, match="WORLD_SIZE is 'two'"), processes.joined("cpu"):
        pass


def test_torchrun_with_one_process_is_that_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(0, 1, 1).items():
        monkeypatch.setenv(name, value)
    with processes.joined("cpu"):
        assert not torch.distributed.is_initialized() and processes.num_processes() == 1
        rows = torch.ones(2, 3)
        assert processes.gather_rows(rows, with_gradient=True) is rows
        assert processes.sum_over_processes(rows) is rows and processes.is_first()
