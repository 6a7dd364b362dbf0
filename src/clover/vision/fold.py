"""A frozen convolutional network made cheaper without changing what it computes.

In: a network in evaluation mode. Out: the same function with its batch norms multiplied into the
convolutions before them, and without the stages behind the last feature level that is read.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

_TOLERANCE = 1e-4
"""Of a folded network's maps, relative to their largest value."""


def drop_unread_stages(network: nn.Module) -> None:
    """Remove the stages behind the last level that is read; what is left computes the same.

    timm's EfficientNets run all their stages whatever levels are asked for. Of Lite0 at stride 16
    that is a third of the time.
    """
    if getattr(network, "feature_hooks", None) is not None:
        return  # levels are taken inside stages, by name
    information: Any = getattr(network, "feature_info", None)
    stages = getattr(network, "blocks", None)
    if information is None or not isinstance(stages, nn.Sequential):
        return
    read = [name.rpartition(".") for name in information.module_name()]
    numbers = [int(number) for parent, _, number in read if parent == "blocks" and number.isdigit()]
    if numbers:  # levels outside `blocks` come before them
        del stages[max(numbers) + 1 :]


@torch.no_grad()
def fold_batch_norms(network: nn.Module, example: Tensor) -> nn.Module:
    """Return the network with each batch norm folded into the convolution it directly follows.

    Args:
        network: In evaluation mode, frozen; it is left as it is.
        example: Pixels [1, 3, S, S], on which the two are compared.

    Returns:
        The folded copy, or `network` itself where nothing can be folded, or where a convolution's
        output is also read elsewhere so that the copy computes something else.
    """
    expected = network(example)
    folded = copy.deepcopy(network)
    pairs = _pairs(folded, example)
    if not pairs:
        return network
    for convolution, norm in pairs:
        module, batch_norm = folded.get_submodule(convolution), folded.get_submodule(norm)
        assert isinstance(module, nn.Conv2d) and isinstance(batch_norm, nn.BatchNorm2d)
        assert batch_norm.running_mean is not None and batch_norm.running_var is not None
        module.weight, module.bias = fuse_conv_bn_weights(
            module.weight,
            module.bias,
            batch_norm.running_mean,
            batch_norm.running_var,
            batch_norm.eps,
            batch_norm.weight,
            batch_norm.bias,
        )
        parent, _, name = norm.rpartition(".")
        # timm's batch norms apply their activation themselves.
        setattr(folded.get_submodule(parent), name, getattr(batch_norm, "act", nn.Identity()))
    found = folded.eval().requires_grad_(False)(example)
    is_equal = all(
        float((ours - theirs).abs().max()) <= _TOLERANCE * float(theirs.abs().max())
        for ours, theirs in zip(found, expected, strict=True)
    )
    return folded if is_equal else network


def _pairs(network: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Return names of convolutions and of the batch norms that read their output, by running it."""
    made: dict[int, tuple[str, Tensor]] = {}  # the tensor is kept, so that its id stays its own
    calls: dict[str, int] = {}
    pairs: list[tuple[str, str]] = []
    handles = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):

            def after(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
                made[id(output)] = (name, output)
                calls[name] = calls.get(name, 0) + 1

            handles.append(module.register_forward_hook(after))
        elif isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:

            def before(module: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
                calls[name] = calls.get(name, 0) + 1
                if id(inputs[0]) in made:
                    pairs.append((made[id(inputs[0])][0], name))

            handles.append(module.register_forward_pre_hook(before))
    network(example)
    for handle in handles:
        handle.remove()
    # Weights that are used twice would be folded twice.
    return [pair for pair in pairs if all(calls[name] == 1 for name in pair)]
