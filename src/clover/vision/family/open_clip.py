"""Any vision tower of open_clip (`pip install 'clover-pathology[open-clip]'`), tokens kept.

`encoder.model` is open_clip's name, for instance `ViT-B-16-SigLIP`; `hf-hub:` weights are fetched
as files. The class token, where the tower has one, comes first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clover.core.config import EncoderConfig
from clover.core.errors import CloverError, nearest
from clover.core.tensors import TensorSource
from clover.vision.token_encoder import Family, Reads, image_tower, renamed


class Tower(nn.Module):
    """The tokens of open_clip's own transformer, or of the timm model it wraps."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual
        self._is_timm = hasattr(visual, "trunk")
        if not self._is_timm:
            visual.output_tokens = True

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, P, E]."""
        if self._is_timm:
            tokens: Tensor = self.visual.trunk.forward_features(pixels)
            return tokens
        pooled_width = self.visual.proj
        # The projection belongs to the pooled vector; the class token is wanted as it was before.
        self.visual.proj = None
        try:
            first, patches = self.visual(pixels)
        finally:
            self.visual.proj = pooled_width
        return torch.cat([first[:, None], patches], dim=1)


def _rename(name: str) -> str:
    return f"visual.{name.removeprefix('module.').removeprefix('visual.')}"


def build(config: EncoderConfig) -> Family:
    """Build the network.

    Raises:
        CloverError: open_clip is not installed, or knows no such model.
    """
    try:
        import open_clip as library
    except ImportError as error:
        raise CloverError(
            "encoder.kind open_clip needs the package open_clip_torch: "
            "pip install 'clover-pathology[open-clip]'"
        ) from error
    if config.model not in library.list_models():
        raise CloverError(
            f"open_clip knows no '{config.model}'{nearest(config.model, library.list_models())}"
        )
    model = library.create_model(
        config.model,
        pretrained=None,
        force_image_size=config.image_size,
        device=torch.get_default_device(),  # meta where a plan only counts
    )
    visual = model.visual
    if not hasattr(visual, "trunk") and not hasattr(visual, "proj"):
        raise CloverError(
            f"open_clip's {config.model} is convolutional and keeps no tokens; name a ViT, or use "
            "kind timm for convolutional networks"
        )

    def collect(source: TensorSource) -> Reads:
        return renamed(image_tower(source), _rename)

    return Family(
        f"open_clip/{config.model}",
        Tower(visual),
        collect,
        mean=tuple(visual.image_mean),
        std=tuple(visual.image_std),
    )
