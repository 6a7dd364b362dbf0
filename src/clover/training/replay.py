"""A step's kernels, launched together: one CUDA graph for each shape of batch.

A step of stage 1 is some eight thousand kernels. A processor that starts each by itself takes
three times as long as the GPU takes to run them (docs/benchmarks.md), so a shape that is met for
the second time is recorded, and from then on its kernels are started by one call.

What is recorded runs the same kernels on the same addresses: inputs are copied into fixed tensors,
gradients are added to tensors that stay (`loop.apply_gradients` clears them and keeps them), and
random numbers come from torch's generator, which counts on as it does without graphs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clover.core.errors import CloverError
from clover.training import processes
from clover.training.device import Device

_LOG = logging.getLogger(__name__)
_MOST = 64
"""Shapes that are recorded; each costs some seconds once, and the kernels' list in memory."""
Function = Callable[..., dict[str, Tensor]]


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: dict[str, Tensor]


def is_on_one_gpu(device: Device) -> bool:
    """Return whether one process computes on a GPU: waiting costs, and steps can be replayed.

    Several processes wait for each other at each step.
    """
    return device.device.type == "cuda" and processes.num_processes() == 1


class Replay:
    """A function of tensors on a GPU that is recorded, and replayed where its shapes come again.

    Args:
        function: From tensors to tensors by name. It must not wait for the GPU, nor look at a
            tensor's numbers; gradients it leaves in weights must be added to tensors that exist.
    """

    def __init__(self, function: Function) -> None:
        self._function = function
        self._recorded: dict[object, _Recorded] = {}
        self._met: set[object] = set()
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._held = 0
        """Bytes of the GPU that the graphs hold together."""
        self._is_off = False

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Run the function on tensors of a GPU; what it returns is the caller's own."""
        shapes = tuple((tuple(item.shape), item.dtype) for item in inputs)
        if shapes in self._recorded:
            return self._replay(self._recorded[shapes], inputs)
        # The first time plainly: libraries choose and load their kernels, gradients are made.
        if self._is_off or shapes not in self._met or len(self._recorded) >= _MOST:
            self._met.add(shapes)
            self._make_room(inputs[0].device)
            return self._function(*inputs)
        stream = torch.cuda.current_stream(inputs[0].device)
        try:
            self._recorded[shapes] = self._record(inputs)
        except RuntimeError as error:
            return self._plainly(inputs, stream, error)
        return self._replay(self._recorded[shapes], inputs)

    def _make_room(self, device: torch.device) -> None:
        """Let recorded graphs go where a plain step may not find room beside what they hold.

        Their memory is theirs while they live, and a step of another shape may need as much.
        """
        if self._recorded and torch.cuda.mem_get_info(device)[0] < self._held:
            self._turn_off("the GPU's memory does not hold recorded steps and others")
            torch.cuda.empty_cache()

    def _turn_off(self, why: str) -> None:
        self._is_off = True
        self._recorded, self._pool = {}, None
        _LOG.warning("kernels are started one by one from now on: %s", why)

    def _plainly(
        self, inputs: tuple[Tensor, ...], stream: torch.cuda.Stream, error: RuntimeError
    ) -> dict[str, Tensor]:
        """Run the function after it could not be recorded, and record nothing any more.

        Raises:
            CloverError: nor does it run; a failed recording can leave the library unusable.
        """
        reason = (str(error).splitlines() or [""])[0]
        self._turn_off(f"a step cannot be recorded ({reason})")
        torch.cuda.set_stream(stream)
        torch.cuda.synchronize(inputs[0].device)
        # Weights that were converted while nothing ran hold no numbers.
        torch.clear_autocast_cache()
        try:
            return self._function(*inputs)
        except RuntimeError as second:
            raise CloverError(
                f"a step could not be recorded ({reason}), nor run after that in this process; "
                "set cuda_graphs to false and give the command again: it goes on from its last "
                "checkpoint"
            ) from second

    def _record(self, inputs: tuple[Tensor, ...]) -> _Recorded:
        device = inputs[0].device
        fixed = tuple(item.clone() for item in inputs)
        graph = torch.cuda.CUDAGraph()
        if self._stream is None:  # of this GPU: torch's own for recording is of the first that did
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        # Other threads go on reading the cache and copying it to the GPU.
        with (
            torch.cuda.device(device),
            torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ),
        ):
            outputs = self._function(*fixed)
        # All graphs share their memory: no two of them run at once.
        self._pool = graph.pool()
        self._held += max(0, torch.cuda.memory_reserved(device) - before)
        return _Recorded(graph, fixed, outputs)

    @staticmethod
    def _replay(recorded: _Recorded, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        for fixed, item in zip(recorded.inputs, inputs, strict=True):
            fixed.copy_(item)
        recorded.graph.replay()
        # The next replay writes over its results.
        return {name: value.clone() for name, value in recorded.outputs.items()}
