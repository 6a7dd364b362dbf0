"""The one loop: objective -> losses as (sum, count) -> backward -> clip -> step -> log.

Same seed, same machine, same result; stopped anywhere, the same call continues to the same result.

Several processes (`processes`) share each batch: every one computes its part's losses as they are
in the whole batch, gradients and counts are summed, and all make the same step.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from clover.core.config import OptimizerConfig, Recipe
from clover.core.errors import CloverError
from clover.core.memory import keep_freed_memory
from clover.core.run import RunFolder, seed_everything
from clover.core.terminal import progress
from clover.training import processes
from clover.training.background import BackgroundWriter
from clover.training.checkpoint import (
    clear_unfinished,
    load_latest,
    save_checkpoint,
    start_own_random,
)
from clover.training.device import Device
from clover.training.objective import Losses, Objective
from clover.training.replay import is_on_one_gpu
from clover.training.sampler import Sampler
from clover.training.schedule import learning_rate
from clover.training.validation import BestWeights, Validation

_NAMED = 8
"""Samples of a bad batch that its error names."""
_AHEAD = 2
"""Steps whose samples are announced beyond the one that is made."""
_VIEWS = 0x76696577
"""Keeps these random numbers apart from the sampler's, which has the same seed."""
_LOG_EVERY = 10  # steps; reading a loss waits for the device, so not every step


@dataclass(frozen=True)
class TrainingJob:
    """Where and how one stage is trained."""

    stage: str
    config: OptimizerConfig
    run: RunFolder
    device: Device
    seed: int
    key: str
    """Fingerprint of all that changes the mathematics; a checkpoint of another key is refused."""
    max_steps: int | None = None
    """Stop (and save) after so many steps, without changing the schedule."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """What went into the key, by name: a refusal says which of them differ."""
    recipe: Recipe | None = None
    """Written into the run folder once no checkpoint of other settings stands in the way."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the loop to stop; it has saved its state."""


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Decay matrices alone: not biases, norms, query tokens, embeddings or the temperature.

    # Paper: decays query_tokens, ln_vision.weight and temp by an accident of names (SPEC, 8.17);
    # here not, because pulling a temperature towards 0 makes the contrast blow up.
    """
    decayed: list[Tensor] = []
    kept: list[Tensor] = []
    for name, item in module.named_parameters():
        if item.requires_grad:
            is_matrix = item.ndim == 2 and not name.endswith("embedding.weight")
            (decayed if is_matrix else kept).append(item)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]


def make_optimizer(
    module: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.AdamW:
    """Return AdamW over what learns; `apply_gradients` steps it."""
    return torch.optim.AdamW(
        parameter_groups(module, weight_decay), lr=learning_rate, betas=betas, fused=True
    )


@torch.no_grad()
def apply_gradients(
    optimizer: torch.optim.Optimizer, total: Tensor, *, clip_norm: float | None
) -> None:
    """Divide the summed gradients by `total`, clip them, step, and let them go.

    Division and clipping are one number, and one pass over the gradients: AdamW's bytes are most
    of a small step. On a GPU gradients are set to zero and stay where they are (`Replay`).

    Args:
        optimizer: AdamW.
        total: Count that the summed losses are a mean over (scalar).
        clip_norm: Largest norm of the mean's gradient; None for any.
    """
    gradients = [
        item.grad
        for group in optimizer.param_groups
        for item in group["params"]
        if item.grad is not None
    ]
    scale = 1 / total
    if clip_norm is not None:
        norm = torch.nn.utils.get_total_norm(gradients) / total
        # As torch's own clipping has it: 1e-6 keeps a gradient of zero from dividing by it.
        scale = scale * (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, scale)
    optimizer.step()
    if total.is_cuda:
        torch._foreach_zero_(gradients)
    else:
        optimizer.zero_grad(set_to_none=True)


def train(objective: Objective, job: TrainingJob, validation: Validation | None = None) -> bool:
    """Train `objective.module` for `job.config.steps` steps, or what is left of them.

    Args:
        objective: What is learnt.
        job: Where and how.
        validation: What is measured meanwhile; its scores go into the metrics, and the weights
            with the best of them into the checkpoints (`BestWeights`).

    Returns:
        Whether all steps are done; False when `max_steps` ended it early.

    Raises:
        CloverError: a loss is not finite (the batch's samples are named).
        Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    config, module = job.config, objective.module.to(job.device.device)
    seed_everything(job.seed)
    start_own_random()
    optimizer = make_optimizer(
        module,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=config.betas,
    )
    sampler = Sampler(
        objective.num_samples(),
        config.batch_size // config.accumulate,
        seed=job.seed,
        sizes=objective.sizes(),
    )
    processes.check_divides(sampler.batch_size, job.stage)
    if job.device.device.type == "cpu":
        keep_freed_memory()
    folder = job.run.checkpoints / job.stage
    if processes.is_first():
        clear_unfinished(folder)
    start = load_latest(
        folder, module=module, optimizer=optimizer, key=job.key, settings=job.settings
    )
    processes.check_same("checkpoints", start)
    if job.recipe is not None:
        job.run.save_recipe(job.recipe)
    processes.take_from_first(module)
    best = BestWeights(folder, validation) if validation is not None else None
    module.train()
    with (
        progress(job.stage, config.steps, done=start) as advance,
        _stop_flag() as stopped,
        BackgroundWriter() as writer,
    ):
        log = _Log(job)
        watch = _Watch(objective, optimizer, job)
        stop = min(config.steps, job.max_steps or config.steps)
        batches = _announced(objective, sampler, job, start, stop)
        for step in range(start, stop):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            losses = _step(objective, optimizer, batches, step, job, watch)
            done = step + 1
            is_measured = best is not None and best.validation.is_due(done, config.steps)
            if is_measured or _is_logged(step, job):
                watch.look()
            note = log.add(step, losses)
            advance(1, note)
            if best is not None and is_measured:
                with log.interrupted():
                    scores = best.validation.measure(module)
                    job.run.log(f"{job.stage}-validation", done, **scores)
                    best.offer(done, scores, module)
            is_stopped = processes.any_process(stopped.is_set())
            if done % config.checkpoint_every == 0 or done == stop or is_stopped:
                watch.look()
                save_checkpoint(
                    folder,
                    step=done,
                    module=module,
                    optimizer=optimizer,
                    key=job.key,
                    settings=job.settings,
                    keep=config.checkpoint_keep,
                    writer=writer if config.checkpoint_in_background else None,
                )
            if is_stopped:  # also after the last step: another stage may come next
                raise Interrupted(f"{job.stage} stopped after step {done}")
    module.eval()
    return max(start, stop) >= config.steps


def _step(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Sequence[int]],
    step: int,
    job: TrainingJob,
    watch: _Watch,
) -> list[Losses]:
    """One optimiser step over `accumulate` batches whose losses add up token by token."""
    config = job.config
    all_losses: list[Losses] = []
    total = torch.zeros((), device=job.device.device)
    for _ in range(config.accumulate):
        indices = next(batches)
        with job.device.autocast():
            losses = objective.losses(objective.collate(indices))
        watch.see(losses.sum.detach(), step, indices)
        if not losses.is_backward_done:
            losses.sum.backward()  # type: ignore[no-untyped-call]
        total = total + losses.count
        all_losses.append(
            Losses(
                losses.sum.detach(),
                losses.count,
                {name: value.detach() for name, value in losses.parts.items()},
            )
        )
    learning = [item for group in optimizer.param_groups for item in group["params"]]
    processes.sum_gradients(learning)
    apply_gradients(optimizer, processes.sum_over_processes(total), clip_norm=config.clip_norm)
    return all_losses


def _announced(
    objective: Objective, sampler: Sampler, job: TrainingJob, start: int, stop: int
) -> Iterator[Sequence[int]]:
    """Yield this process's part of each batch of the steps to come, announced some steps before.

    Random numbers come from the batch's number: not from a generator that would be ahead of its
    step, and so of its checkpoint.
    """
    parts = job.config.accumulate
    ahead: deque[Sequence[int]] = deque()
    for number in range(start * parts, stop * parts):
        batch = sampler.batch(number)
        random = np.random.SeedSequence([job.seed, _VIEWS, number])
        draws = random.generate_state(len(batch), np.uint32).tolist()
        ahead.append(processes.own_part(batch))
        objective.announce(ahead[-1], processes.own_part(draws))
        if len(ahead) > _AHEAD * parts:
            yield ahead.popleft()
    yield from ahead


def _named(objective: Objective, indices: Sequence[int]) -> str:
    """Return the first samples of a batch by the names of their records."""
    names = ", ".join(objective.names(indices[:_NAMED]))
    return f"{names}…" if len(indices) > _NAMED else names


class _Watch:
    """Sees to it that no step is made with a loss that is not finite.

    On a processor the loss is looked at before the step. A GPU would have to be waited for: it
    keeps the first such loss, and which one it was, and AdamW leaves the weights as they are from
    then on; the loop looks when it waits anyway, and before anything is written.
    """

    def __init__(self, objective: Objective, optimizer: torch.optim.Optimizer, job: TrainingJob):
        self._objective, self._job = objective, job
        self._seen: list[tuple[int, Sequence[int]]] = []
        """Step and samples of each loss since the last look."""
        self._first: Tensor | None = None
        """Place of the first bad one among them; beyond them while there is none."""
        if not is_on_one_gpu(job.device):
            return
        self._none = torch.iinfo(torch.int64).max
        self._first = torch.full((), self._none, device=job.device.device)
        self._loss = torch.zeros((), device=job.device.device)
        self._is_bad = torch.zeros((), device=job.device.device)
        optimizer.found_inf = self._is_bad  # type: ignore[attr-defined]  # as torch's own scaler does

    def see(self, loss: Tensor, step: int, indices: Sequence[int]) -> None:
        """Note the loss of a batch.

        Raises:
            CloverError: it is not finite, and the device need not be waited for.
        """
        if self._first is None:
            if not torch.isfinite(loss):
                self._refuse(loss, step, indices)
            return
        is_first = ~torch.isfinite(loss) & (self._is_bad == 0)
        self._first.masked_fill_(is_first, len(self._seen))
        self._loss.copy_(torch.where(is_first, loss, self._loss))
        self._is_bad.masked_fill_(is_first, 1.0)
        self._seen.append((step, indices))

    def look(self) -> None:
        """Wait for the device.

        Raises:
            CloverError: a loss was not finite; the weights are those of the step before it.
        """
        if self._first is None:
            return
        first = int(self._first)
        if first != self._none:
            self._refuse(self._loss, *self._seen[first])
        self._seen = []

    def _refuse(self, loss: Tensor, step: int, indices: Sequence[int]) -> NoReturn:
        stage = self._job.stage
        raise CloverError(
            f"{stage}: the loss of step {step} is {loss.item()}; its samples are "
            f"{_named(self._objective, indices)}; lower {stage}.learning_rate?"
        )


def _is_logged(step: int, job: TrainingJob) -> bool:
    return (step + 1) % _LOG_EVERY == 0 or step + 1 == job.config.steps


class _Log:
    """Means over the last steps and all processes, written every `_LOG_EVERY` steps."""

    def __init__(self, job: TrainingJob) -> None:
        self._job = job
        self._sum: Tensor | float = 0.0
        self._count: Tensor | float = 0.0
        self._parts: dict[str, list[Tensor]] = {}
        self._since = time.perf_counter()
        self._steps = 0

    def add(self, step: int, losses: list[Losses]) -> str | None:
        self._steps += 1
        for item in losses:
            self._sum = self._sum + item.sum
            self._count = self._count + item.count
            for name, value in item.parts.items():
                self._parts.setdefault(name, []).append(value)
        if not _is_logged(step, self._job):
            return None
        if processes.num_processes() > 1:
            self._take_in_others()
        loss = float(self._sum / self._count)
        seconds = (time.perf_counter() - self._since) / self._steps
        values = {name: float(torch.stack(parts).mean()) for name, parts in self._parts.items()}
        rate = learning_rate(self._job.config, step)
        self._job.run.log(
            self._job.stage,
            step + 1,
            loss=round(loss, 5),
            learning_rate=rate,
            seconds_per_step=round(seconds, 4),
            **{name: round(value, 5) for name, value in values.items()},
        )
        self._sum = self._count = 0.0
        self._parts, self._steps, self._since = {}, 0, time.perf_counter()
        return f"loss {loss:.3f}"

    @contextlib.contextmanager
    def interrupted(self) -> Iterator[None]:
        """Leave the time that the block takes out of the seconds a step."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def _take_in_others(self) -> None:
        """Replace sums by those over all processes, parts by their means."""
        means = [torch.stack(parts).mean() for parts in self._parts.values()]
        sums = (torch.as_tensor(item) for item in (self._sum, self._count, *means))
        own = torch.stack([item.float() for item in sums])
        everyone = processes.sum_over_processes(own)
        self._sum, self._count = everyone[0], everyone[1]
        means = list(everyone[2:] / processes.num_processes())
        self._parts = {name: [mean] for name, mean in zip(self._parts, means, strict=True)}


@contextlib.contextmanager
def _stop_flag() -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into a flag; the second one stops at once.

    Not where several processes train: `torchrun` passes on what the terminal or Slurm has sent to
    each of them already, so that one wish arrives twice.
    """
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if flag.is_set() and processes.num_processes() == 1:
            raise KeyboardInterrupt
        flag.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
