"""A classifier out of a few labelled images: how likely each answer's words are, taught by shots.

A tuned bridge writes the answer's words where the language model looks for the image (`grounding`).
So it already says how likely each candidate answer is, without a shot. Shots move the projection
alone, in the directions of the candidates' words: a convex problem with a few thousand unknowns,
solved in milliseconds. The fewer the shots, the more stays of what the model knew.

Axis letters: N images, C candidates, Q visual tokens, D width of a query row, H of a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

PENALTY = 0.1
"""Weight of half the squared change of the projection, beside the summed loss of the shots."""
PRIOR = 0.1
"""How much of its own opinion a model keeps, beside what the shots say: grounded bridges are surer
than they are right on tissue they never saw."""


@dataclass(frozen=True)
class Candidates:
    """Answers to choose from, as the language model spells them.

    Attributes:
        words: Embeddings of each answer's tokens, fillers behind, less the mean word [C, Q, H].
    """

    words: Floats

    def basis(self) -> Floats:
        """Return orthonormal directions of the words in which candidates differ [H, R]."""
        differences = self.words - self.words.mean(axis=0)
        rows = differences.reshape(-1, differences.shape[-1])
        _, strengths, directions = np.linalg.svd(rows, full_matrices=False)
        return np.asarray(directions[strengths > 1e-6 * strengths.max()].T)


@dataclass(frozen=True)
class Taught:
    """What shots have added to a projection.

    Attributes:
        change: Of the projection's weight [H, D].
        shift: Of its bias [H].
    """

    change: Floats
    shift: Floats
    scores: Floats
    """Of the images asked [M, C]."""


def opinions(visual: Floats, candidates: Candidates) -> Floats:
    """Return how likely each answer's words are by the visual tokens alone, up to a constant.

    Args:
        visual: Visual tokens less the mean word [N, Q, H].
        candidates: C answers.

    Returns:
        [N, C]: summed over places; a softmax over C is the likelihood among the candidates, because
        what normalises a place is the same for all of them.
    """
    return np.asarray(np.einsum("nqh,cqh->nc", visual, candidates.words))


def teach(
    hidden: Floats,
    labels: NDArray[np.int64],
    asked: Floats,
    *,
    candidates: Candidates,
    prior: tuple[Floats, Floats] | None,
    penalty: float = PENALTY,
    keep: float = PRIOR,
) -> Taught:
    """Fit the projection to shots by the likelihood of their answers; score other images.

    Args:
        hidden: Query rows of the shots [N, Q, D].
        labels: The right candidate of each [N].
        asked: Query rows of the images to score [M, Q, D].
        candidates: C answers.
        prior: What the model says of shots [N, C] and asked [M, C] before (`opinions`); None for a
            model that was never taught to answer.
        penalty: See `PENALTY`.
        keep: See `PRIOR`.
    """
    from scipy.optimize import minimize
    from scipy.special import logsumexp

    basis = candidates.basis()  # [H, R]
    spelt = (candidates.words - candidates.words.mean(axis=0)) @ basis  # [C, Q, R]
    center = hidden.mean(axis=0)  # [Q, D]
    middle = np.zeros(len(spelt))
    rank, width = basis.shape[1], hidden.shape[2]
    design = _design(hidden - center, spelt)  # [N, C, R * D]
    scale = float(np.sqrt((design**2).sum(axis=2).mean())) or 1.0
    design /= scale
    mine, theirs = (np.zeros((len(rows), len(spelt))) for rows in (hidden, asked))
    if prior is not None:
        middle = keep * prior[0].mean(axis=0)
        mine, theirs = keep * prior[0] - middle, keep * prior[1] - middle
    hot = np.eye(len(spelt))[labels]

    def loss(flat: Floats) -> tuple[float, Floats]:
        weights, bias = flat[: rank * width], flat[rank * width :]
        scores = mine + design @ weights + bias
        total = logsumexp(scores, axis=1)
        error = np.exp(scores - total[:, None]) - hot
        value = (total - (scores * hot).sum(axis=1)).sum() + 0.5 * penalty * (weights @ weights)
        # Candidates' biases have a common part that changes nothing.
        value += 0.5e-3 * (bias @ bias)
        slope = np.einsum("nc,ncd->d", error, design) + penalty * weights
        return float(value), np.concatenate([slope, error.sum(axis=0) + 1e-3 * bias])

    start = np.zeros(rank * width + len(spelt))
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 300}).x
    weights, bias = found[: rank * width].reshape(rank, width) / scale, found[rank * width :]
    scores = theirs + _design(asked - center, spelt) @ weights.ravel() + bias
    change = basis @ weights  # [H, D]
    return Taught(change, _shift(candidates, change, center, bias - middle), scores)


def _design(rows: Floats, spelt: Floats) -> Floats:
    """Return what a change of the projection is multiplied by, image by candidate [N, C, R * D]."""
    made: Any = np.einsum("nqd,cqr->ncrd", rows, spelt)
    return np.asarray(made.reshape(len(rows), len(spelt), -1))


def _shift(candidates: Candidates, change: Floats, center: Floats, bias: Floats) -> Floats:
    """Return the change of the projection's bias [H] that centres rows and adds class biases.

    Least squares: one bias for all places cannot always give every class its own.
    """
    words = candidates.words - candidates.words.mean(axis=0)  # [C, Q, H]
    wanted = bias - np.einsum("cqh,hd,qd->c", words, change, center)
    found: Any = np.linalg.lstsq(words.sum(axis=1), wanted - wanted.mean(), rcond=None)[0]
    return np.asarray(found)
