"""Transformers whose tokens the Q-Former reads: what all families share.

A family (`clover/vision/family`) says how a network is built, how its checkpoint's tensors are
called, and how pixels become tokens; this file loads, freezes, prepares images and encodes.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from clover.core.assets import resolve
from clover.core.config import EncoderConfig, family_files, unknown_family
from clover.core.errors import CloverError
from clover.core.files import sha256_file
from clover.core.tensors import TensorSource, open_tensors
from clover.vision import family as families
from clover.vision.encoder import map_revisions, revisions, unloaded_encoder
from clover.vision.image_processor import CLIP_MEAN, CLIP_STD, ImageProcessor
from clover.vision.quantise import quantise

Triple = tuple[float, float, float]
Reads = dict[str, Callable[[], Tensor]]
"""Name of a network's tensor -> how to read it."""
_TOWER = re.compile(r"^(module\.)?(visual_encoder|visual|vision_model)\.")


@dataclass(frozen=True)
class Family:
    """A network that is built but not loaded.

    Attributes:
        id: Library and architecture.
        network: Its `forward` takes pixels [B, 3, S, S] and returns tokens [B, P, E].
        collect: A checkpoint -> how to read each of the network's tensors, by our name; None
            when `build` has loaded them.
        mean: The library's normalisation.
        std: The library's normalisation.
        adapt: (name, found, wanted) -> a tensor of the wanted shape, for learned positions.
    """

    id: str
    network: nn.Module
    collect: Callable[[TensorSource], Reads] | None
    mean: Triple = CLIP_MEAN
    std: Triple = CLIP_STD
    adapt: Callable[[str, Tensor, Tensor], Tensor] = lambda name, found, wanted: found


def build_family(config: EncoderConfig) -> tuple[EncoderConfig, Family]:
    """Build the network a recipe names, with fresh weights.

    Returns:
        The configuration with what a register of models adds to it, and the network.

    Raises:
        CloverError: unknown family or architecture.
    """
    config, module = _expanded(config)
    with torch.random.fork_rng(devices=[]):
        # Random weights, where none are named, are the same everywhere. The CPU's generator alone:
        # `torch.manual_seed` would leave every other device seeded.
        torch.default_generator.manual_seed(0)
        built: Family = module.build(config)
    return config, built


def _expanded(config: EncoderConfig) -> tuple[EncoderConfig, Any]:
    """Return the configuration with what a register adds to it, and the family's module."""
    files = family_files()
    if config.kind not in files:
        raise CloverError(f"encoder.kind: {unknown_family(config.kind)}")
    module = _module(config.kind, files[config.kind])
    return _expanded(module.expand(config)) if hasattr(module, "expand") else (config, module)


def _is_own(path: Path) -> bool:
    return path.parent != Path(families.__path__[0])


def _module(kind: str, path: Path) -> Any:
    """Import a family's file.

    Raises:
        CloverError: one's own file does not run, or has no `build`.
    """
    if not _is_own(path):
        return importlib.import_module(f"clover.vision.family.{kind}")
    spec = importlib.util.spec_from_file_location(f"clover_family_{kind}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        raise CloverError(f"{path} does not run: {type(error).__name__}: {line}") from error
    if not hasattr(module, "build"):
        raise CloverError(f"{path} has no build(config), which returns a Family (docs/models.md)")
    return module


class TokenEncoder:
    """A frozen transformer from an image to its tokens, class token first where there is one.

    Args:
        config: Names family, architecture, weights, size.

    Raises:
        CloverError: as `build_family`; or weights that do not fit, or are nowhere named.
    """

    def __init__(self, config: EncoderConfig) -> None:
        if config.kind == "known" and _expanded(config)[0].weights is None:
            raise CloverError(
                f"the register names no weights of encoder.model '{config.model}'; name them "
                "yourself: encoder.weights=path:FILE"
            )
        config, built = build_family(config)
        if config.weights is not None and built.collect is not None:
            load(built, built.collect(open_tensors(resolve(config.weights))), config.weights)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = number_format(config)
        network = built.network.eval().requires_grad_(False)
        self.network = network.to(device=device, dtype=self._dtype)
        self.id = built.id
        self.licence = config.licence
        self.licence_note = config.licence_note
        self.batch_size = config.batch_size
        self.microns_per_pixel = config.microns_per_pixel
        self._device = device
        self._process = _processor(config, built)
        self.num_tokens, self.width = token_shape(self.network, config.image_size)
        if config.numbers == "int8":
            quantise(self.network, device)
        self.revision, self.named_revision = _revisions(config, self._process)

    def prepare(self, image: Image.Image) -> Tensor:
        """Return one image as the network wants it [3, S, S]."""
        return self._process(image)

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, P, E], float32 on the CPU, without gradient."""
        return self.encode_there(pixels).float().cpu()

    @torch.no_grad()
    def encode_there(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, P, E] where the network is, in its format; no GPU is awaited."""
        there = pixels.to(self._device, non_blocking=True)
        tokens: Tensor = self.network(there.to(self._dtype))
        return tokens

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self._device


def _processor(config: EncoderConfig, built: Family) -> ImageProcessor:
    return ImageProcessor(config.image_size, config.mean or built.mean, config.std or built.std)


def _revisions(config: EncoderConfig, process: ImageProcessor) -> tuple[str, str]:
    more = {
        "options": config.options,
        "pixels": [config.image_size, process.mean, process.std],
        "numbers": config.numbers,
    }
    path = family_files().get(config.kind)
    if path is not None and _is_own(path):
        more["code"] = sha256_file(path)
    return revisions(config, more)


def describe(config: EncoderConfig) -> dict[str, Any]:
    """Return what a model folder says of an encoder: id, revision, width, licence.

    Its weights need not be at hand, except for transformers' folders, which say what they are.

    Raises:
        CloverError: as `build_family`.
    """
    if config.kind in ("timm", "tiny"):
        plain = unloaded_encoder(config)
        named, identity, width = config, plain.id, plain.width
        revision = map_revisions(config)[0] if config.kind == "timm" else plain.revision
    elif config.kind == "transformers_vision":
        encoder = TokenEncoder(config)
        named, identity, revision, width = config, encoder.id, encoder.revision, encoder.width
    else:
        with torch.device("meta"):
            named, built = build_family(config)
        identity, revision = built.id, _revisions(named, _processor(named, built))[0]
        width = token_shape(built.network, named.image_size)[1]
    said = {"id": identity, "revision": revision, "width": width, "licence": named.licence}
    return said | ({"licence_note": named.licence_note} if named.licence_note else {})


def number_format(config: EncoderConfig) -> torch.dtype:
    """Return the format of what is no product of integers."""
    dtype: torch.dtype = getattr(torch, "float32" if config.numbers == "int8" else config.numbers)
    return dtype


def token_shape(network: nn.Module, size: int) -> tuple[int, int]:
    """Return tokens an image and width of a token, without computing any.

    Raises:
        CloverError: the network cannot read images of this size.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    weights = next(network.parameters())
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            pixels = torch.empty(1, 3, size, size, device=weights.device, dtype=weights.dtype)
            found = network(pixels)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise CloverError(
            f"the encoder cannot read images of encoder.image_size {size}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if found.ndim != 3:
        raise CloverError(
            f"the encoder gives {list(found.shape)}, not tokens [B, P, E]; use kind: timm for "
            "convolutional networks"
        )
    return int(found.shape[1]), int(found.shape[2])


def image_tower(source: TensorSource) -> TensorSource:
    """Return the part of a checkpoint that sees; all of it where no name says which that is.

    A whole CLIP's text tower is called as an image tower by itself is: `transformer.resblocks.0`.
    """
    if not any(_TOWER.match(name) for name in source):
        return source
    return source.renamed(lambda name: name if _TOWER.match(name) else None)


def renamed(source: TensorSource, rename: Callable[[str], str | None]) -> Reads:
    """Return the reads of a checkpoint whose tensors only have other names.

    Raises:
        CloverError: two tensors would have one name here.
    """
    reads: Reads = {}
    named: dict[str, str] = {}
    for theirs in source:
        ours = rename(theirs)
        if ours is None:
            continue
        if ours in named:
            raise CloverError(
                f"{source.path} holds {named[ours]} and {theirs}, of which only one can be this "
                "encoder's: it holds more than one model; save the image encoder by itself"
            )
        named[ours] = theirs
        reads[ours] = partial(source.__getitem__, theirs)
    return reads


def load(family: Family, reads: Reads, name: str) -> None:
    """Copy a checkpoint into a network, tensor by tensor.

    Raises:
        CloverError: tensors are missing or of another shape; they are named.
    """
    state = family.network.state_dict()
    missing = [name for name in state if name not in reads]
    if missing:
        raise CloverError(
            f"{name} does not fit {family.id}: {len(missing)} of {len(state)} tensors are "
            f"missing, for instance {', '.join(missing[:3])}; "
            + (f"it has {', '.join(list(reads)[:3])}" if reads else "it has none of them")
        )
    for tensor, target in state.items():
        found = family.adapt(tensor, reads[tensor](), target)
        if found.shape != target.shape:
            raise CloverError(
                f"{name} does not fit {family.id}: {tensor} is {list(found.shape)}, the "
                f"architecture wants {list(target.shape)}; another model, or another "
                "encoder.image_size"
            )
        with torch.no_grad():
            target.copy_(found)
