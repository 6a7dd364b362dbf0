"""Eight bits for a frozen image encoder on a CPU: a quarter of the memory, faster products.

Weights: each row becomes integers in -127 … 127 and one scale. Activations: each token becomes
integers in -63 … 63 and one scale of its own, so that an image's tokens do not depend on what else
is in its batch (the feature cache relies on that). Seven bits and not eight: a processor
without VNNI adds pairs of products in 16 bits, and 255 · 127 · 2 overflows them without a word.

Norms, attention between tokens, patches and positions stay float32. Measured: docs/models.md.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clover.core.errors import CloverError
from clover.core.linear import is_linear

_LEVELS = 63


class Int8Linear(nn.Module):
    """A linear layer whose weights and activations are multiplied as integers.

    Args:
        linear: The layer whose weights it takes over.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self.scale = weight.abs().amax(dim=1).clamp_min(1e-12) / 127  # [N]
        values = (weight / self.scale[:, None]).round().to(torch.int8)
        self.weight = torch.ops.onednn.qlinear_prepack(values, None)  # [N, K], in oneDNN's order
        self.zero = torch.zeros(len(weight), dtype=torch.int32)
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        rows = x.reshape(-1, x.shape[-1])
        step = rows.abs().amax(dim=1, keepdim=True).clamp_min_(1e-12).div_(_LEVELS)  # [M, 1]
        # oneDNN wants them without a sign: 0 is written as 64.
        integers = torch.div(rows, step).round_().add_(_LEVELS + 1).to(torch.uint8)
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            integers,
            1.0,
            _LEVELS + 1,
            self.weight,
            self.scale,
            self.zero,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        product.mul_(step)
        if self.bias is not None:
            product.add_(self.bias)
        return product.view(*x.shape[:-1], -1)


def _has_integer_products() -> bool:
    """Return whether this torch multiplies integers: tried, as builds name what they lack too."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        Int8Linear(nn.Linear(8, 8))(torch.ones(1, 8))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return True


def quantise(network: nn.Module, device: torch.device) -> int:
    """Replace the linear layers of an encoder in place; return how many.

    Layers that a library reads from inside (torch's own attention module) stay as they are.

    Raises:
        CloverError: the encoder runs on something else than a CPU, or torch has no such products.
    """
    if device.type != "cpu":
        raise CloverError(
            f"encoder.numbers int8 is for a CPU, and the encoder runs on {device.type}; "
            "encoder.numbers=bfloat16 is faster there"
        )
    if not _has_integer_products():
        raise CloverError(
            "encoder.numbers int8 needs a torch that was built with oneDNN, as those for x86 and "
            "for Linux on ARM are, and this one was not; encoder.numbers=float32 runs everywhere"
        )
    count = 0
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if is_linear(child):
                setattr(parent, name, Int8Linear(child))
                count += 1
    return count
