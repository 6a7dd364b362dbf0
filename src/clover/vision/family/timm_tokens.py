"""Any transformer of timm, tokens instead of a pooled vector.

Register tokens are scratch space of the network and are left out, as their authors advise; the
class token stays, first. `encoder.options` goes to `timm.create_model`; `mlp_layer` and `act_layer`
may be names. Weights: a folder or file fetched with `hf://ORG/NAME@REVISION`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clover.core.config import EncoderConfig
from clover.core.errors import CloverError, nearest
from clover.vision.token_encoder import Family, renamed


class TimmTokens(nn.Module):
    """The network's last tokens without its registers.

    Args:
        network: A timm model with `forward_features`.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self._prefix = int(getattr(network, "num_prefix_tokens", 0))
        self._registers = int(getattr(network, "num_reg_tokens", 0))

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, P, E]."""
        tokens: Tensor = self.network.forward_features(pixels)
        if not self._registers:
            return tokens
        kept = tokens[:, : self._prefix - self._registers]
        return torch.cat([kept, tokens[:, self._prefix :]], dim=1)


def _rename(name: str) -> str | None:
    return f"network.{name.removeprefix('model.')}"


def build(config: EncoderConfig) -> Family:
    """Build the network.

    Raises:
        CloverError: timm knows no such model, or not with these options.
    """
    import timm
    from timm import layers

    options = dict(config.options)
    if isinstance(options.get("mlp_layer"), str):
        options["mlp_layer"] = getattr(layers, options["mlp_layer"])
    if not timm.is_model(config.model):
        known = timm.list_models(f"{config.model[:4]}*")
        raise CloverError(f"timm knows no '{config.model}'{nearest(config.model, known)}")
    try:
        # The head is not needed; img_size is what learned positions are made for.
        options = {"num_classes": 0, "img_size": config.image_size, **options}
        network = timm.create_model(config.model, pretrained=False, **options)
    except TypeError as error:
        raise CloverError(
            f"timm's {config.model} does not take encoder.options {sorted(config.options)}: {error}"
        ) from error
    data = network.default_cfg
    return Family(
        f"timm_tokens/{config.model}",
        TimmTokens(network),
        lambda source: renamed(source, _rename),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )
