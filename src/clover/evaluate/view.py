"""What the model is shown in an evaluation: the image, or something that only looks like one.

A model that answers as well without the image does not look at it. A view replaces the image, or
changes it in a way that should change no answer, or puts the question in other words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clover.core.errors import CloverError, nearest
from clover.core.record import image_path
from clover.core.transparency import on_white
from clover.evaluate.pixels import CHANGES
from clover.evaluate.rewording import reworded
from clover.vision.dataset import FeatureSet
from clover.vision.encoder import ImageEncoder
from clover.vision.leaks import Pictured

View = Literal[
    "image",
    "blind",
    "shuffled",
    "noise",
    "grey",
    "stain",
    "jpeg",
    "turned",
    "mirrored",
    "paraphrase",
]
BASIC: tuple[View, ...] = ("blind", "shuffled", "noise")
"""Controls that take the image away."""
CONTROLS: tuple[View, ...] = get_args(View)[1:]
"""All of them; behind `BASIC` those that should change no answer, grey-scale apart."""
_NUM_NOISE = 8  # different noise images; one alone could be a lucky one
_NOISE_SIDE = 224


def find_controls(names: str | None) -> tuple[View, ...]:
    """Return the controls of ``basic``, ``all`` or a comma-separated list; none for None.

    Raises:
        CloverError: an unknown name.
    """
    if names is None:
        return ()
    wanted: list[str] = []
    for name in (part.strip() for part in names.split(",")):
        if name == "basic":
            wanted += BASIC
        elif name == "all":
            wanted += CONTROLS
        elif name in CONTROLS:
            wanted.append(name)
        else:
            raise CloverError(f"no control '{name}'{nearest(name, ('basic', 'all', *CONTROLS))}")
    return tuple(view for view in CONTROLS if view in wanted)


class Viewer:
    """Pictures and questions of records, as one view shows them.

    Args:
        data: The records.
        view: ``image``: its own; ``blind``: none; ``shuffled``: another record's image, never one
            of the same group; ``noise``: images of uniform noise; ``grey``, ``stain``, ``jpeg``,
            ``turned``, ``mirrored``: its own, changed (`pixels`); ``paraphrase``: its own, with
            the question in other words (`rewording`).
        seed: Of shuffling and noise.
    """

    def __init__(self, data: Pictured, *, view: View, seed: int = 0) -> None:
        self.view = view
        self._data = data
        self._random = np.random.default_rng(seed)
        self._partner = self._other_images() if view == "shuffled" else []
        self._noise = self._noise_images() if view == "noise" else []

    @property
    def changes_pixels(self) -> bool:
        """Whether images are changed, so that no cached features of them exist."""
        return self.view in CHANGES

    def key(self, index: int) -> str:
        """Return what the shown image is: records with equal keys are shown the same."""
        if self.view == "blind":
            return "blind"
        if self.view == "noise":
            return f"noise-{index % _NUM_NOISE}"
        return self._data.digests[self._source(index)]

    def question(self, index: int) -> str | None:
        """Return the question as this view puts it; None where it cannot."""
        question = self._data.records[index].question or ""
        return reworded(question) if self.view == "paraphrase" else question

    def picture(self, index: int) -> Image.Image | None:
        """Return the shown picture, RGB; None in the blind view.

        Raises:
            CloverError: it cannot be read.
        """
        if self.view == "blind":
            return None
        if self.view == "noise":
            return self._noise[index % _NUM_NOISE]
        record = self._data.records[self._source(index)]
        path = image_path(record, self._data.images)
        try:
            with Image.open(path) as opened:
                picture = on_white(opened).convert("RGB")
        except (OSError, ValueError) as error:
            raise CloverError(f"cannot read the image {path}: {error}") from error
        change = CHANGES.get(self.view)
        return picture if change is None else change(picture, self.key(index))

    def _source(self, index: int) -> int:
        return self._partner[index] if self.view == "shuffled" else index

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

    def _noise_images(self) -> list[Image.Image]:
        shape = (_NOISE_SIDE, _NOISE_SIDE, 3)
        return [
            Image.fromarray(self._random.integers(0, 256, shape, dtype=np.uint8))
            for _ in range(_NUM_NOISE)
        ]


class FeatureViewer(Viewer):
    """The same, as the tokens that the frozen encoder makes of the pictures.

    Blind is tokens that are all zero, so that nothing of any image gets through.
    """

    def __init__(
        self, data: FeatureSet, encoder: ImageEncoder, *, view: View, seed: int = 0
    ) -> None:
        super().__init__(data, view=view, seed=seed)
        self._features = data
        self._encoder = encoder
        self._encoded: dict[str, Tensor] = {}
        if view == "noise":
            tokens = self._encode(self._noise)
            self._encoded = {f"noise-{place}": tokens[place] for place in range(_NUM_NOISE)}

    def features(self, indices: Sequence[int]) -> Tensor:
        """Return tokens [B, P, E] as this view shows them."""
        if self.view == "blind":
            return torch.zeros_like(self._features.features(indices[:1])).expand(
                len(indices), -1, -1
            )
        if self.view != "noise" and not self.changes_pixels:
            return self._features.features([self._source(index) for index in indices])
        if self.changes_pixels:
            self._encode_changed(indices)
        return torch.stack([self._encoded[self.key(index)] for index in indices])

    def _encode_changed(self, indices: Sequence[int]) -> None:
        """Encode what these records show, and forget what the ones before them showed."""
        first = {self.key(index): index for index in reversed(indices)}
        held = {key: self._encoded[key] for key in first if key in self._encoded}
        missing = [key for key in first if key not in held]
        if missing:
            pictures = [self.picture(first[key]) for key in missing]
            # Half precision in between, as in the feature cache: equal pixels, equal tokens.
            tokens = self._encode([picture for picture in pictures if picture is not None])
            held |= dict(zip(missing, tokens.half().float(), strict=True))
        self._encoded = held

    def _encode(self, pictures: Sequence[Image.Image]) -> Tensor:
        pixels = [self._encoder.prepare(picture) for picture in pictures]
        return self._encoder.encode(torch.stack(pixels)).float()
