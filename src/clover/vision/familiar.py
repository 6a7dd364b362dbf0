"""How familiar an image is: its distance from the images a model learnt from.

A model answers about anything it is shown: a photograph, a page of text, an organ it never saw. So
the frozen encoder's pooled tokens of the training images are described by one normal distribution
(probabilistic PCA), and an image farther from it than nearly all training images is named.

In: image tokens [P, E]. Out: a share of training images that are nearer, 0 to 1.

Source: Tipping and Bishop 1999, "Probabilistic principal component analysis"; the distance is
Mahalanobis's under it, as Lee et al. 2018 use it on a network's features.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clover.core.errors import CloverError
from clover.core.files import atomic_path

if TYPE_CHECKING:
    from clover.vision.dataset import FeatureSet

UNFAMILIAR = 0.99
"""An image farther than this share of training images is said to be unlike them."""
_COMPONENTS = 64
_FOLDS = 5
_MOST = 4096
"""Images that are read, drawn at random: more do not change the distribution."""
_READ = 64
"""Images a reading."""
_FEWEST = 50
"""Images below which no distribution is fitted."""
_NAMES = ("mean", "scale", "axes", "variances", "rest", "distances")


def pool(tokens: Tensor) -> Tensor:
    """Return mean and standard deviation over tokens: [B, P, E] to [B, 2E]."""
    tokens = tokens.float()
    return torch.cat([tokens.mean(dim=1), tokens.std(dim=1, correction=0)], dim=-1)


def describe(data: FeatureSet) -> Familiarity | None:
    """Return the distribution of a training set's images as they are, at most 4,096 of them."""
    row_of = {digest: row for row, digest in enumerate(data.digests)}
    chosen = sorted(row_of)
    if len(chosen) > _MOST:
        chosen = random.Random(0).sample(chosen, _MOST)
    parts = [pool(data.cache.get(chosen[i : i + _READ])) for i in range(0, len(chosen), _READ)]
    # Records are parsed when they are asked for: those of the chosen images alone.
    groups = [data.records[row_of[digest]].group or digest for digest in chosen]
    return Familiarity.fit(torch.cat(parts), groups)


@dataclass(frozen=True)
class Familiarity:
    """A distribution of pooled tokens, and how far its own images lie from it.

    Attributes:
        mean: [D], of pooled tokens; D = 2E.
        scale: [D], their deviation.
        axes: [D, K], principal directions of the standardised rows.
        variances: [K], along them.
        rest: Mean variance in each of the D - K other directions (scalar).
        distances: [N], of training images, each from a distribution fitted without its group;
            ascending.
    """

    mean: Tensor
    scale: Tensor
    axes: Tensor
    variances: Tensor
    rest: Tensor
    distances: Tensor

    @classmethod
    def fit(cls, rows: Tensor, groups: Sequence[str]) -> Familiarity | None:
        """Describe training images.

        Args:
            rows: [N, D], from `pool`.
            groups: What each row comes from (patient, slide); never on both sides of a distance.

        Returns:
            None where fewer than 50 images, or too few groups, say too little.
        """
        names = sorted(set(groups))
        if len(rows) < _FEWEST or len(names) < _FOLDS:
            return None
        fold_of = {name: place % _FOLDS for place, name in enumerate(names)}
        folds = torch.tensor([fold_of[group] for group in groups])
        rows = rows.double().cpu()
        distances = torch.empty(len(rows), dtype=torch.float64)
        for fold in range(_FOLDS):
            distances[folds == fold] = _fitted(rows[folds != fold]).distance(rows[folds == fold])
        whole = _fitted(rows)
        return cls(*whole.values(), distances.sort().values.float())

    def values(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the distribution without the distances."""
        return self.mean, self.scale, self.axes, self.variances, self.rest

    def distance(self, rows: Tensor) -> Tensor:
        """Return the squared Mahalanobis distance of pooled rows: [N, D] to [N]."""
        standard = (rows.to(self.mean) - self.mean) / self.scale
        along = standard @ self.axes
        across = standard.square().sum(dim=-1) - along.square().sum(dim=-1)
        return (along.square() / self.variances).sum(dim=-1) + across.clamp_min(0) / self.rest

    def share_nearer(self, tokens: Tensor) -> float:
        """Return the share of training images that are nearer than an image `[1, P, E]`."""
        found = self.distance(pool(tokens.cpu())).to(self.distances)
        return float(torch.searchsorted(self.distances, found)[0]) / len(self.distances)

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically."""
        state = {name: getattr(self, name).float().contiguous() for name in _NAMES}
        with atomic_path(path) as partial:
            save_file(state, str(partial), metadata={"format": "pt"})

    @classmethod
    def load(cls, path: Path) -> Familiarity:
        """Read what `save` wrote.

        Raises:
            CloverError: the file is damaged.
        """
        try:
            state = load_file(str(path))
            return cls(*(state[name] for name in _NAMES))
        except (SafetensorError, OSError, KeyError) as error:
            raise CloverError(f"{path} is not a whole familiarity file: {error}") from error


def _fitted(rows: Tensor) -> Familiarity:
    """Return the distribution of rows [N, D], float64, without distances."""
    mean, scale = rows.mean(dim=0), rows.std(dim=0).clamp_min(1e-6)
    standard = (rows - mean) / scale
    kept = min(_COMPONENTS, len(rows) // 8, rows.shape[1] - 1)
    _, singular, axes = torch.linalg.svd(standard, full_matrices=False)
    variances = singular.square() / len(rows)
    rest = variances[kept:].sum() / (rows.shape[1] - kept)
    empty = torch.empty(0)
    return Familiarity(mean, scale, axes[:kept].T, variances[:kept], rest.clamp_min(1e-9), empty)
