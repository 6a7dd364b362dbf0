"""A frozen language model spread over processes, for one that does not fit on a GPU (FSDP2).

Each process holds a share of every layer. A layer is put together just before it computes, forward
and backward, and taken apart again; embeddings and the vocabulary's head stay whole in each
process. Nothing is summed on the way back: no weight of it learns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from clover.core.errors import CloverError


def spread_layers(model: Any, device: torch.device) -> None:
    """Spread the layers of a transformers model over all processes; the rest goes to `device`.

    From then on every process must call it equally often: each pass is one of all of them.

    Args:
        model: On the CPU, so that no GPU ever holds all of it.
        device: Of this process.

    Raises:
        CloverError: transformers does not say what the model's layers are.
    """
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model.requires_grad_(False)
    names = set(model._no_split_modules or ())
    stacks = [
        module
        for module in model.modules()
        if any(_is_stack(child, names) for child in module.children())
    ]
    if not stacks:
        raise CloverError(
            f"language.spread: transformers names no layers of a {model.config.model_type} model; "
            "set it to false and take a smaller or a quantised one"
        )
    mesh = init_device_mesh(device.type, (get_world_size(),))
    for stack in stacks:
        layers = [
            layer
            for child in stack.children()
            if _is_stack(child, names)
            for layer in child.children()
        ]
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        inside = {item for layer in layers for item in layer.parameters()}
        # The stack itself only makes the next layer's share come while one computes.
        rest = {item for item in stack.parameters() if item not in inside}
        fully_shard(stack, mesh=mesh, ignored_params=rest)
    model.to(device)
    model.is_spread = True


def _is_stack(module: nn.Module, names: set[str]) -> bool:
    children = list(module.children())
    return (
        isinstance(module, nn.ModuleList)
        and bool(children)
        and all(type(child).__name__ in names for child in children)
    )
