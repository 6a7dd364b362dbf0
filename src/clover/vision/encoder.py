"""The seam for image encoders, and the encoders behind it."""

from __future__ import annotations

import logging
import pickle
import warnings
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from clover.core.assets import content, parse, resolve
from clover.core.config import EncoderConfig
from clover.core.errors import CloverError, nearest
from clover.core.files import fingerprint
from clover.core.transparency import rgb_on_white
from clover.vision.fold import drop_unread_stages, fold_batch_norms
from clover.vision.image_processor import ImageProcessor

_LOG = logging.getLogger(__name__)
_PIXELS_A_PASS = 4 * 224 * 224
"""What a convolutional network reads at once on a CPU: with more, its maps leave the cache, and
the system clears fresh pages for each of them (Lite0: 27 ms an image in fours, 43 in dozens)."""


class ImageEncoder(Protocol):
    """A frozen network from an image to tokens.

    Attributes:
        id: Library and architecture, for instance ``timm/tf_efficientnet_lite0``.
        revision: Fingerprint of weights, by what they hold, and token map; part of every cache key.
        named_revision: The same by the weights' name alone: what a model folder states that was
            written where they were not at hand, or by an earlier CLOVER.
        num_tokens: Tokens an image, P.
        width: Width of a token, E.
        licence: Of the weights.
        licence_note: What it says of models trained on the tokens; empty when it says nothing.
        microns_per_pixel: Resolution it was trained at, where it is known.
        batch_size: Images a forward pass.
    """

    id: str
    revision: str
    named_revision: str
    num_tokens: int
    width: int
    licence: str
    licence_note: str
    microns_per_pixel: float | None
    batch_size: int

    def prepare(self, image: Image.Image) -> Tensor:
        """Return one image as the network wants it [3, S, S]."""
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, P, E], without gradient."""
        ...


class FeatureMapEncoder:
    """A convolutional network whose feature levels become one token map.

    Levels finer than the grid are folded into it (space to depth), so that no place is blurred and
    a nucleus of a few pixels keeps its own numbers; coarser levels are repeated. Each level's part
    of a token is normalised by itself, so that no level drowns another.

    # Paper: uses the last map alone. A 7 x 7 map blurs nuclei: docs/decisions/0001.
    """

    def __init__(self, config: EncoderConfig) -> None:
        import timm

        chosen = {"out_indices": config.levels} if config.levels else {}
        try:
            network = timm.create_model(
                config.model, pretrained=False, features_only=True, **chosen
            )
        except RuntimeError as error:
            known = timm.list_models(f"{config.model[:4]}*")
            raise CloverError(
                f"timm knows no '{config.model}'{nearest(config.model, known)}"
            ) from error
        except IndexError as error:
            raise CloverError(
                f"encoder.levels {list(config.levels)}: {config.model} has fewer feature levels"
            ) from error
        if config.weights is not None:
            _load_in_order(network, config)
        network = network.eval().requires_grad_(False)
        drop_unread_stages(network)
        example = torch.rand(
            1, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0)
        )
        # Depthwise convolutions run twice as fast on a CPU with channels last.
        self.network: nn.Module = fold_batch_norms(network, example).to(
            memory_format=torch.channels_last
        )
        self.id = f"timm/{config.model}"
        self.licence, self.licence_note = config.licence, config.licence_note
        self.batch_size = config.batch_size
        self.microns_per_pixel = config.microns_per_pixel
        self._size, self._grid = config.image_size, config.grid
        data = network.default_cfg
        self._process = ImageProcessor(config.image_size, tuple(data["mean"]), tuple(data["std"]))
        with torch.no_grad():
            maps = self.network(example)
        for level, found in enumerate(maps):
            side = found.shape[-1]
            if side % self._grid and self._grid % side:
                raise CloverError(
                    f"encoder.grid {self._grid} does not divide, nor is divided by, the {side} x "
                    f"{side} map of feature level {level}"
                )
        self.width = sum(self._fold(found).shape[-1] for found in maps)
        self.num_tokens = self._grid**2
        self.revision, self.named_revision = map_revisions(config)

    def prepare(self, image: Image.Image) -> Tensor:
        """Return one image as the network wants it [3, S, S]."""
        return self._process(image)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, P, E], without gradient."""
        images = max(1, _PIXELS_A_PASS // self._size**2)
        return torch.cat([self._encode(part) for part in torch.split(pixels, images)])

    def _encode(self, pixels: Tensor) -> Tensor:
        maps = self.network(pixels.contiguous(memory_format=torch.channels_last))
        return torch.cat([self._fold(found) for found in maps], dim=-1)  # [B, P, E]

    def _fold(self, level: Tensor) -> Tensor:
        """[B, C, S, S] -> [B, P, C'], normalised, without averaging anything away."""
        factor = level.shape[-1] // self._grid
        if factor > 1:
            level = F.pixel_unshuffle(level, factor)
        elif factor < 1:
            repeat = self._grid // level.shape[-1]
            level = level.repeat_interleave(repeat, 2).repeat_interleave(repeat, 3)
        tokens = level.flatten(2).transpose(1, 2)
        return F.layer_norm(tokens, tokens.shape[-1:])


def revisions(config: EncoderConfig, more: dict[str, Any]) -> tuple[str, str]:
    """Return an encoder's fingerprint by what its weights hold, and by their name alone.

    Another checkpoint at the same place is another encoder; the same one elsewhere is not. What the
    recipe pins goes by its pin. Where the weights are not at hand, both are by name.

    Args:
        config: Names the weights.
        more: What else decides the tokens.
    """
    asset = parse(config.weights) if config.weights else None
    name = asset and [asset.reference, asset.sha256]
    held = None if asset is None or asset.kind == "wheel" else content(asset.reference)
    by_name = {"weights": name, **more, "form": 1}
    by_content = by_name if held is None else by_name | {"weights": ["sha256", held]}
    return fingerprint(by_content), fingerprint(by_name)


def map_revisions(config: EncoderConfig) -> tuple[str, str]:
    """Return the two revisions of a `FeatureMapEncoder`; its weights need not be at hand."""
    more = {"levels": config.levels, "grid": config.grid, "size": config.image_size}
    return revisions(config, more)


def _load_in_order(network: nn.Module, config: EncoderConfig) -> None:
    """Load a checkpoint whose tensors are the network's in the same order under other names."""
    path = resolve(str(config.weights))
    state = _read_tensors(path)
    source = [item for name, item in state.items() if not name.endswith("num_batches_tracked")]
    target = {
        name: item
        for name, item in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    # The classifier and the layers behind the last feature map come last; they are not needed.
    loaded = dict(zip(target, source, strict=False))
    for name, item in target.items():
        if name not in loaded or loaded[name].shape != item.shape:
            raise CloverError(f"{path} does not fit {config.model}: tensor {name} differs in shape")
    network.load_state_dict(loaded, strict=False)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle's protocol; what matters is raised
            state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, SafetensorError) as error:
        raise CloverError(
            f"{path} cannot be read as weights ({type(error).__name__}): it is torn, or holds "
            "more than tensors; use safetensors or a plain state dict"
        ) from error
    return state


class TinyEncoder:
    """A seeded random projection of patches, for tests: no weights, same output everywhere."""

    def __init__(self, config: EncoderConfig) -> None:
        self.id = "tiny/patches"
        self.licence, self.licence_note = "MIT", config.licence_note
        self.batch_size = config.batch_size
        self.microns_per_pixel = config.microns_per_pixel
        self._size, self._grid = config.image_size, config.grid
        self.num_tokens, self.width = self._grid**2, 24
        self.revision = self.named_revision = fingerprint([self._size, self._grid])
        generator = torch.Generator().manual_seed(0)
        patch = 3 * (self._size // self._grid) ** 2
        self._weight = torch.randn(patch, self.width, generator=generator) / patch**0.5

    def prepare(self, image: Image.Image) -> Tensor:
        """Return one image as pixels in [-1, 1], [3, S, S]."""
        side = (self._size // self._grid) * self._grid
        image = rgb_on_white(image).resize((side, side), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, P, E]."""
        patches = F.pixel_unshuffle(pixels, self._size // self._grid).flatten(2).transpose(1, 2)
        tokens: Tensor = patches @ self._weight
        return tokens


def unloaded_encoder(config: EncoderConfig) -> TinyEncoder | FeatureMapEncoder:
    """Build an encoder of kind `tiny` or `timm` without its weights, for its shapes."""
    if config.kind == "tiny":
        return TinyEncoder(config)
    return FeatureMapEncoder(config.model_copy(update={"weights": None}))


def load_encoder(config: EncoderConfig) -> ImageEncoder:
    """Build the encoder a recipe names.

    Raises:
        CloverError: unknown architecture, or weights that do not fit it.
    """
    if config.kind == "tiny":
        return TinyEncoder(config)
    if config.weights is None and config.kind != "known":
        _LOG.warning(
            "encoder.weights is empty: the weights of %s are random, its features say little",
            config.model,
        )
    if config.kind == "timm":
        return FeatureMapEncoder(config)
    from clover.vision.token_encoder import TokenEncoder

    return TokenEncoder(config)
