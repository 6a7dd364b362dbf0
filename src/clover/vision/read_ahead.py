"""Features on their way to a GPU, beside the steps before.

A step of stage 1 takes a GPU some hundredths of a second and 26 MB of features (36 images of
EVA-g's): read by the thread that makes the steps, in float32, they would take longer than the step.
So announced batches are gathered as they are stored into page-locked memory, copied on a stream of
their own, and become float32 on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clover.vision.storage import unpack

Gather = Callable[[Sequence[str], Sequence[int] | None], dict[str, Tensor]]
_THREADS = 2


@dataclass(frozen=True)
class Coming:
    """A batch as it is stored, and when it is there."""

    packed: dict[str, Tensor]
    copied: torch.cuda.Event


@dataclass
class ReadAhead:
    """Brings batches to a GPU.

    Attributes:
        gather: From digests and views to what is stored of them, in page-locked memory.
        device: The GPU.
    """

    gather: Gather
    device: torch.device
    _pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(_THREADS, thread_name_prefix="features"),
        init=False,
    )
    _stream: torch.cuda.Stream = field(init=False)

    def __post_init__(self) -> None:
        # By its number, and here: in a new thread the GPU without one is the first.
        if self.device == torch.device("cuda"):
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def start(self, digests: Sequence[str], views: Sequence[int] | None) -> Future[Coming]:
        """Begin to bring these images' features."""
        return self._pool.submit(self._bring, digests, views)

    def take(self, coming: Coming) -> Tensor:
        """Return tokens [B, P, E], float32 on the GPU; the stream of this thread waits for them."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(coming.copied)
        for item in coming.packed.values():
            item.record_stream(stream)  # whose memory was taken for the other stream
        return unpack(coming.packed)

    def now(self, digests: Sequence[str], views: Sequence[int] | None) -> Tensor:
        """Return what nobody announced."""
        return self.take(self._bring(digests, views))

    def _bring(self, digests: Sequence[str], views: Sequence[int] | None) -> Coming:
        stored = self.gather(digests, views)
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            moved = {name: item.to(self.device, non_blocking=True) for name, item in stored.items()}
            return Coming(moved, self._stream.record_event())
