"""What the model is shown in an evaluation: the image, or something that only looks like one.

A model that answers as well without the image does not look at it. Each view replaces the image
tokens and leaves the question alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clover.vision.dataset import FeatureSet
from clover.vision.encoder import ImageEncoder

View = Literal["image", "blind", "shuffled", "noise"]
CONTROLS: tuple[View, ...] = ("blind", "shuffled", "noise")
_NUM_NOISE = 8  # different noise images; one alone could be a lucky one


class Viewer:
    """Image tokens of records, as one view shows them.

    Args:
        data: The records and their features.
        encoder: Encodes the noise.
        view: ``image``: its own; ``blind``: tokens that are all zero, so that nothing of any image
            gets through; ``shuffled``: another record's image, never one of the same group;
            ``noise``: images of uniform noise.
        seed: Of shuffling and noise.
    """

    def __init__(
        self, data: FeatureSet, encoder: ImageEncoder, *, view: View, seed: int = 0
    ) -> None:
        self.view = view
        self._data = data
        self._random = np.random.default_rng(seed)
        self._partner = self._other_images() if view == "shuffled" else []
        self._noise = self._make_noise(encoder) if view == "noise" else torch.empty(0)

    def key(self, index: int) -> str:
        """Return what the shown image is: records with equal keys are shown the same."""
        if self.view == "image":
            return self._data.digests[index]
        if self.view == "shuffled":
            return self._data.digests[self._partner[index]]
        return f"noise-{index % _NUM_NOISE}" if self.view == "noise" else "blind"

    def features(self, indices: Sequence[int]) -> Tensor:
        """Return tokens [B, P, E] as this view shows them."""
        if self.view == "image":
            return self._data.features(indices)
        if self.view == "shuffled":
            return self._data.features([self._partner[index] for index in indices])
        if self.view == "noise":
            return self._noise[[index % _NUM_NOISE for index in indices]]
        return torch.zeros_like(self._data.features(indices[:1])).expand(len(indices), -1, -1)

    def _other_images(self) -> list[int]:
        """For each record choose a record of another group, or of another image at least."""
        groups = [record.group or record.image for record in self._data.records]
        size = len(groups)
        partner = []
        for index, group in enumerate(groups):
            other = int(self._random.integers(size))
            for _ in range(50):
                if groups[other] != group:
                    break
                other = int(self._random.integers(size))
            partner.append(other if groups[other] != group else index)
        return partner

    def _make_noise(self, encoder: ImageEncoder) -> Tensor:
        pixels = []
        for _ in range(_NUM_NOISE):
            array = self._random.integers(0, 256, (224, 224, 3), dtype=np.uint8)
            pixels.append(encoder.prepare(Image.fromarray(array)))
        return encoder.encode(torch.stack(pixels)).float()
