"""Several processes of one training: which one this is, and what they tell each other.

`torchrun` and `accelerate launch` start the same command N times, with environment variables that
say which is which. Inside `joined` these processes know each other; outside of it, and in a process
that was started alone, every function here returns what it was given.

The first process writes files and speaks; the others compute, and read.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import cache, wraps
from inspect import signature
from itertools import count
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from clover.core.config import Recipe
from clover.core.errors import CloverError
from clover.core.files import fingerprint, held
from clover.core.run import LOCK

Item = TypeVar("Item")
Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")
_PATIENCE_S = 600
"""How long one process waits for the others; CLOVER_PATIENCE_S in the environment says otherwise.
A process that dies is noticed at once, one that hangs or is cut off after this."""
_BUCKET = 8 * 2**20
"""Numbers that are summed in one message: large enough for bandwidth, small beside the model."""
_FAILED = "clover/failed"
_LINGER_S = 3.0
"""How long a first process that failed waits for the others to fail too: a dead one never does."""
_joins = count()


class ProcessLost(CloverError):
    """Another process has ended, or does not answer."""


def num_started() -> int:
    """Return how many processes `torchrun` started, this one included; 1 without it."""
    return _from_environment("WORLD_SIZE", 1)


def is_first() -> bool:
    """Return whether this process is the one that writes and speaks, also outside of `joined`."""
    if dist.is_initialized():
        return dist.get_rank() == 0
    return num_started() == 1 or _from_environment("RANK", 0) == 0


def num_processes() -> int:
    """Return how many processes train together here: 1 outside of `joined`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextlib.contextmanager
def joined(device: str) -> Iterator[None]:
    """Let the processes that were started together know each other inside the block.

    Of several that fail, for one reason or because one of them did, the first to notice says so;
    the others leave with the same exit code and say nothing. Without torchrun, one that notices
    only after some seconds may find nobody to ask, and says so too.

    Args:
        device: The recipe's; on GPUs each process takes the one of its local rank.

    Raises:
        CloverError: fewer GPUs than processes, or an environment that does not say who is who.
    """
    if num_started() == 1 or dist.is_initialized():
        yield
        return
    is_on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if is_on_gpu:
        _take_gpu(device)
    store = PrefixStore(f"clover-{next(_joins)}", _store())
    with _meeting():
        dist.init_process_group(
            # Messages between processors go by gloo in any case: they never wait for a GPU.
            "cpu:gloo,cuda:nccl" if is_on_gpu else "gloo",
            store=store,
            rank=_from_environment("RANK", 0),
            world_size=num_started(),
            timeout=timedelta(seconds=_patience_s()),
        )
    try:
        # One that fails and leaves while another still connects would be a network error there.
        wait_for_all()
        yield
    except BaseException as error:
        is_speaker = _is_first_to_fail(store)
        if not is_on_gpu:  # NCCL would wait for messages that never come
            _leave()
            if is_first():  # it holds the store, which the others will ask
                atexit.register(_linger, store)
        if not is_speaker:
            sys.exit(_exit_code(error))
        raise
    _leave()


def refuse_several(what: str) -> None:
    """Raise where more than one process was started; one of them says so for all.

    Args:
        what: The command, for the message.

    Raises:
        CloverError: in the process that speaks; the others exit with its code.
    """
    if num_started() > 1:
        with joined("cpu"):
            raise CloverError(f"{what} runs in one process; start it without torchrun")


def together(
    stage: Callable[Concatenate[Recipe, Arguments], Result],
) -> Callable[Concatenate[Recipe, Arguments], Result]:
    """Run a stage `joined`: its first argument is the recipe, which names the device."""

    @wraps(stage)
    def run(recipe: Recipe, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with joined(recipe.device):
            return stage(recipe, *args, **kwargs)

    return run


def alone_in(
    *names: str,
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Run a stage only while no other training works in its folders.

    Args:
        names: The stage's arguments that are folders. The first process holds them for all.

    Raises:
        CloverError: another process trains in one of them.
    """

    def decorate(stage: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @wraps(stage)
        def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            given = signature(stage).bind(*args, **kwargs).arguments
            with contextlib.ExitStack() as stack:
                for name in names if is_first() else ():
                    stack.enter_context(held(given[name] / LOCK, f"trains in {given[name]}"))
                wait_for_all()  # where one is refused, the others hear of it at once
                return stage(*args, **kwargs)

        return run

    return decorate


def _leave() -> None:
    with contextlib.suppress(RuntimeError):  # the others may be gone
        dist.destroy_process_group()


def _take_gpu(device: str) -> None:
    local, there = _from_environment("LOCAL_RANK", 0), torch.cuda.device_count()
    if ":" in device:
        raise CloverError(
            f"device '{device}' is one GPU, and {num_started()} processes would share it; write "
            "device: cuda, of which each process takes its own"
        )
    if local >= there:
        raise CloverError(
            f"process {local} of this machine finds {there} GPUs; start one process a GPU "
            f"(torchrun --nproc-per-node {there}), or take device: cpu"
        )
    torch.cuda.set_device(local)


@cache
def _store() -> Any:
    """Return the store through which the processes find each other, once a process."""
    with _meeting():
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=_patience_s())))
    return store


@contextlib.contextmanager
def _meeting() -> Iterator[None]:
    """Say in our words what torch says when processes do not find each other."""
    try:
        yield
    except ValueError as error:
        raise CloverError(
            f"WORLD_SIZE is {num_started()}, but {error}; start several processes with "
            "torchrun, or unset WORLD_SIZE for one"
        ) from error
    except RuntimeError as error:
        raise ProcessLost(
            f"the {num_started()} processes did not find each other within {_patience_s():g} s: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _is_first_to_fail(store: Any) -> bool:
    try:
        return bool(store.add(_FAILED, 1) == 1)
    except RuntimeError:  # whoever held the store is gone
        return True


def _linger(store: Any) -> None:
    """Stay, after the message is out, until all others have failed too; one may be dead.

    torchrun's own store outlives all of them.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    end = time.monotonic() + _LINGER_S
    with contextlib.suppress(RuntimeError):
        while store.add(_FAILED, 0) < num_started() and time.monotonic() < end:
            time.sleep(0.05)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, CloverError) else 1


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise CloverError(f"{name} is '{text}' in the environment, not a number") from error


def _patience_s() -> float:
    return float(os.environ.get("CLOVER_PATIENCE_S", _PATIENCE_S))


@contextlib.contextmanager
def _talking() -> Iterator[None]:
    """Say in our words what torch says when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(
            f"one of the {num_processes()} processes of this training ended, or did not answer for "
            f"{_patience_s():g} s; what was saved is kept, the same command continues from there"
        ) from error


def own_part(items: Sequence[Item]) -> Sequence[Item]:
    """Return this process's part of what all work on: equal parts, in the order of ranks.

    Args:
        items: As many as the processes divide.
    """
    if num_processes() == 1:
        return items
    size = len(items) // num_processes()
    return items[rank() * size : (rank() + 1) * size]


def check_divides(size: int, what: str) -> None:
    """Raise where the processes cannot share the samples of a pass equally; `what` has them."""
    share = num_processes()
    if size % share:
        fitting = [n for n in (size - size % share, size + share - size % share) if n]
        raise CloverError(
            f"{what}: {share} processes cannot share {size} samples a pass equally; take a batch "
            f"(batch_size / accumulate) of {' or '.join(map(str, fitting))}"
        )


def any_process(said: bool) -> bool:
    """Return whether any process says so."""
    if num_processes() == 1:
        return said
    flag = torch.tensor([int(said)], dtype=torch.int32)
    with _talking():
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())


def check_same(what: str, value: Any) -> None:
    """Raise where the processes do not agree on something they all read from disk.

    Args:
        what: For the message.
        value: JSON-able.
    """
    if num_processes() == 1:
        return
    mark = torch.tensor([int(fingerprint(value)[:15], 16)])
    if not (gather_rows(mark) == mark).all():
        raise CloverError(
            f"the {num_processes()} processes find different {what}; data, feature cache and --out "
            "must lie on a disk that all machines see"
        )


def wait_for_all() -> None:
    """Return when every process has come here."""
    any_process(False)


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Run the block in one process of a machine after the other: for what takes much memory."""
    if num_processes() == 1:
        yield
        return
    own = _from_environment("LOCAL_RANK", rank())
    turns = int(gather_rows(torch.tensor([own])).max()) + 1
    for _ in range(own):
        wait_for_all()
    yield
    for _ in range(own, turns):
        wait_for_all()


@torch.no_grad()
def take_from_first(module: nn.Module) -> None:
    """Overwrite parameters and buffers with those of the first process."""
    if num_processes() > 1:
        with _talking():
            for item in (*module.parameters(), *module.buffers()):
                dist.broadcast(item.data, src=0)


def sum_over_processes(value: Tensor) -> Tensor:
    """Return the sum of every process's `value`; no gradient."""
    if num_processes() == 1:
        return value
    total = value.detach().clone()
    with _talking():
        dist.all_reduce(total)
    return total


@torch.no_grad()
def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Add every process's gradients, in place.

    Gradients of summed losses, summed: divided afterwards by the summed count they are those of the
    one large batch. torch's DistributedDataParallel averages instead, hooks into the one `forward`
    of a module where ours has a method for each pass, and wants to know in advance which parameters
    a step leaves out; its overlap of sending and computing is what is given up.

    A parameter that has a gradient nowhere keeps none: AdamW must not move it.
    """
    if num_processes() == 1:
        return
    has_gradient = torch.tensor([int(item.grad is not None) for item in parameters])
    with _talking():
        dist.all_reduce(has_gradient, dist.ReduceOp.MAX)
    gradients = []
    for item, there in zip(parameters, has_gradient.tolist(), strict=True):
        if there:
            item.grad = torch.zeros_like(item) if item.grad is None else item.grad
            gradients.append(item.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([item.flatten() for item in bucket])
        with _talking():
            dist.all_reduce(flat)
        parts = torch.split(flat, [item.numel() for item in bucket])
        for item, part in zip(bucket, parts, strict=True):
            item.copy_(part.view_as(item))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for item in tensors:
        if bucket and sum(other.numel() for other in bucket) + item.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(item)
    if bucket:
        yield bucket


class _Gather(torch.autograd.Function):
    """Rows of all processes; backward gives each process what all of them say of its rows."""

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        context.size = len(rows)
        return _gathered(rows)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> Tensor:
        start = rank() * context.size
        own = sum_over_processes(grad.float().contiguous())[start : start + context.size]
        return own.to(grad.dtype)


def gather_rows(rows: Tensor, *, with_gradient: bool = False) -> Tensor:
    """Return the rows of every process, in the order of ranks: [B, ...] to [N, ...].

    Args:
        rows: Of the same shape everywhere.
        with_gradient: Whether the losses of other processes reach this one's rows. Then every
            process must run backward through it.
    """
    if num_processes() == 1:
        return rows
    if with_gradient:
        gathered: Tensor = _Gather.apply(rows)
        return gathered
    return _gathered(rows.detach())


def _gathered(rows: Tensor) -> Tensor:
    rows = rows.contiguous()
    found = [torch.empty_like(rows) for _ in range(num_processes())]
    with _talking():
        dist.all_gather(found, rows)
    return torch.cat(found)
