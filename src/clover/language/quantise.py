"""Fewer bits for frozen weights: 8-bit integers of our own, or bitsandbytes' 8 and 4 bits.

`int8`: each row of a weight matrix becomes integers in -127 … 127 and one scale, the row's largest
absolute value / 127. The product is computed in the activations' own format, so gradients pass to
the visual tokens as before. Embeddings, norms and the head stay as they are.

# Why not torchao: docs/decisions/0009.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clover.core.config import LanguageConfig
from clover.core.errors import CloverError


class Int8Linear(nn.Module):
    """A frozen linear layer whose weight is one byte a value.

    Args:
        linear: The layer whose weights it takes over.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        values = linear.weight.detach().float()
        scale = values.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
        self.register_buffer("weight", (values / scale).round().to(torch.int8))  # [N, K]
        self.register_buffer("scale", scale.squeeze(1).to(linear.weight.dtype))  # [N]
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        # The matrix is spelt out for this product only: one layer at a time is full-sized.
        product: Tensor = _Product.apply(x, self.weight) * self.scale.to(x.dtype)
        return product if self.bias is None else product + self.bias.to(x.dtype)


class _Product(torch.autograd.Function):
    """x @ weight.T with an integer weight, which is spelt out again in the backward pass.

    Keeping the full-sized weight for the backward pass would cost what the integers save.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor) -> Tensor:
        context.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = context.saved_tensors
        return grad @ weight.to(grad.dtype), None


def quantise_int8(model: nn.Module) -> int:
    """Replace the linear layers of a model in place, its head apart; return how many.

    Args:
        model: A transformers model.
    """
    head: Callable[[], Any] = getattr(model, "get_output_embeddings", lambda: None)
    kept = head()
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child is not kept:
                setattr(parent, name, Int8Linear(child))
                count += 1
    return count


def keep_gradients(model: nn.Module) -> None:
    """Keep bitsandbytes' layers of 4 bits fit to learn through, on whichever processor.

    Where a CPU multiplies bfloat16, such a layer orders its weight anew at its first answer, for a
    kernel that knows no gradient: a stage 2 that went on after an answer would learn nothing.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.__dict__["support_avx512bf16_for_cpu"] = False


def bitsandbytes_config(config: LanguageConfig, dtype: torch.dtype) -> Any:
    """Return transformers' configuration for 8 or 4 bits through bitsandbytes.

    Args:
        config: Says how many.
        dtype: What products are computed in (4 bits); bitsandbytes computes 8 bits in its own.

    Raises:
        CloverError: bitsandbytes, or accelerate which transformers needs for it, is not installed.
    """
    try:
        import accelerate  # noqa: F401
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise CloverError(
            f"language.quantise {config.quantise} needs the package {error.name}: "
            "pip install 'clover-pathology[bits]'; language.quantise=int8 needs none"
        ) from error
    from transformers import BitsAndBytesConfig

    if config.quantise == "bnb-8bit":
        # It says at each product that it multiplies in float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
