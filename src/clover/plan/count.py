"""Count what a computation would allocate and compute, without values (torch's meta device)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Count:
    """Of one call.

    Attributes:
        peak: Largest number of bytes alive at once, beyond what was there before.
        operations: Floating-point operations of matrix products.
    """

    peak: int
    operations: int


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Add up the storages that are alive; those of before the block are not counted."""

    def __init__(self, before: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = {item.untyped_storage()._cdata for item in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # transformers asks whether a mask has no gap: it has none.
            return True
        out = func(*args, **(kwargs or {}))
        for item in tree_flatten(out)[0]:
            if isinstance(item, Tensor):
                self._take(item.untyped_storage())
        return out

    def _take(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def count(call: Callable[[], object], *, before: Sequence[Tensor] = ()) -> Count:
    """Run `call` and count.

    Args:
        call: Computes on meta tensors.
        before: Tensors that were there already, weights and inputs.
    """
    with FlopCounterMode(display=False) as operations, _Allocations(before) as allocations:
        call()
    return Count(allocations.peak, int(operations.get_total_flops()))


def num_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's weights, shared ones once."""
    items = {id(item): item for item in (*module.parameters(), *module.buffers())}
    return sum(item.numel() * item.element_size() for item in items.values())
