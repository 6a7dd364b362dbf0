"""Any vision model of transformers: CLIP, SigLIP, DINOv2, ViT and so on, last hidden state.

`encoder.weights` is a folder in transformers' form, whose `config.json` says what the network is.
Without weights `encoder.options` is that configuration, `model_type` included. No code that comes
with a checkpoint is run. Class token first where the network has one; registers are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from clover.core.assets import resolve
from clover.core.config import EncoderConfig
from clover.core.errors import CloverError, nearest
from clover.core.files import read_json
from clover.vision.image_processor import CLIP_MEAN, CLIP_STD
from clover.vision.token_encoder import Family


class HiddenState(nn.Module):
    """The last hidden state of a transformers vision model, registers left out."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self._registers = int(getattr(network.config, "num_register_tokens", 0) or 0)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, P, E]."""
        tokens: Tensor = self.network(pixel_values=pixels).last_hidden_state
        if not self._registers:
            return tokens
        return torch.cat([tokens[:, :1], tokens[:, 1 + self._registers :]], dim=1)


def _load(folder: Path) -> Any:
    """Load the vision part of a folder in transformers' form.

    Raises:
        CloverError: it holds no such model, or not all of its tensors.
    """
    from transformers import AutoModel

    if not (folder / "config.json").exists():
        raise CloverError(f"{folder} is no folder in transformers' form: it has no config.json")
    try:
        model, report = AutoModel.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise CloverError(f"cannot read the vision model in {folder}: {line}") from error
    # A two-tower model: only the tower that sees is wanted.
    tower = "vision_model" if hasattr(model, "vision_model") else ""
    missing = [name for name in report["missing_keys"] if name.startswith(tower)]
    if missing:
        raise CloverError(
            f"{folder} does not fit its own config.json: {len(missing)} tensors are missing, for "
            f"instance {min(missing)}"
        )
    return model.get_submodule(tower)


def _fresh(options: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = str(options.get("model_type", "none"))
    if kind not in CONFIG_MAPPING:
        known = nearest(kind, CONFIG_MAPPING)
        raise CloverError(f"transformers knows no model_type '{kind}'{known}")
    shape = AutoConfig.for_model(**options)
    try:
        return AutoModel.from_config(getattr(shape, "vision_config", shape))
    except ValueError as error:
        raise CloverError(
            f"transformers has no vision model for model_type '{kind}'; use the vision part's own"
        ) from error


def build(config: EncoderConfig) -> Family:
    """Build the network, and load it when there are weights.

    Raises:
        CloverError: no such model type in transformers, one without a vision part, or a folder
            that is none.
    """
    if config.weights is None:
        network = _fresh(config.options)
        pixels: dict[str, Any] = {}
    else:
        folder = resolve(config.weights)
        network = _load(folder)
        path = folder / "preprocessor_config.json"
        pixels = read_json(path) if path.exists() else {}
    return Family(
        f"transformers/{network.config.model_type}",
        HiddenState(network),
        None,
        mean=tuple(pixels.get("image_mean") or CLIP_MEAN),
        std=tuple(pixels.get("image_std") or CLIP_STD),
    )
