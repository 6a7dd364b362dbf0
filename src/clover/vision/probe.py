"""What frozen features hold without any model of ours: pooled, and read by simple classifiers.

In: features [N, D]. Out: names. A linear probe and the nearest class mean: the references beside
which a bridge has to show what it adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # scoring must not pay for torch
    from clover.vision.dataset import FeatureSet

Floats = NDArray[np.float64]


def pooled(data: FeatureSet) -> NDArray[np.float32]:
    """Return mean and standard deviation over an image's tokens, [N, 2E], a row a record."""
    known: dict[str, NDArray[np.float32]] = {}
    for index, digest in enumerate(data.digests):
        if digest not in known:
            tokens = data.features([index])[0].numpy()
            known[digest] = np.concatenate([tokens.mean(axis=0), tokens.std(axis=0)])
    return np.stack([known[digest] for digest in data.digests])


def standardised(
    train: NDArray[Any], test: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return both [N, D] and [M, D] with the mean and deviation of the first taken out."""
    center = train.mean(axis=0, dtype=np.float64)
    spread = train.std(axis=0, dtype=np.float64) + 1e-9
    return (train - center) / spread, (test - center) / spread


def nearest_class_mean(train: NDArray[Any], labels: Sequence[str], test: NDArray[Any]) -> list[str]:
    """Return for each row of `test` [M, D] the label whose mean in `train` [N, D] is nearest."""
    names = sorted(set(labels))
    places = np.array([names.index(label) for label in labels])
    means = np.stack([train[places == place].mean(axis=0) for place in range(len(names))])
    distances = ((test[:, None] - means[None]) ** 2).sum(axis=2)  # [M, K]
    return [names[place] for place in distances.argmin(axis=1)]


@dataclass(frozen=True)
class SoftmaxClassifier:
    """A linear classifier: answer names, weights [D, K], biases [K]."""

    names: list[str]
    weights: Floats
    biases: Floats

    def predict(self, features: Floats) -> list[str]:
        """Return the likeliest name for each row of features [N, D]."""
        places = (features @ self.weights + self.biases).argmax(axis=1)
        return [self.names[place] for place in places]


def fit_softmax(
    features: Floats, labels: Sequence[str], *, penalty: float = 1.0
) -> SoftmaxClassifier:
    """Fit multinomial logistic regression by L-BFGS.

    Args:
        features: [N, D], best standardised.
        labels: N names.
        penalty: Weight of half the squared weights beside the summed loss; biases are free.
    """
    from scipy.optimize import minimize
    from scipy.special import logsumexp

    names = sorted(set(labels))
    place = {name: at for at, name in enumerate(names)}
    truth = np.array([place[label] for label in labels])
    rows, width, kinds = len(truth), features.shape[1], len(names)
    hot = np.zeros((rows, kinds))
    hot[np.arange(rows), truth] = 1.0

    def loss(flat: Floats) -> tuple[float, Floats]:
        weights, biases = flat[: width * kinds].reshape(width, kinds), flat[width * kinds :]
        logits = features @ weights + biases  # [N, K]
        log_total = logsumexp(logits, axis=1)
        value = (log_total - logits[np.arange(rows), truth]).sum()
        value += 0.5 * penalty * (weights**2).sum()
        error = np.exp(logits - log_total[:, None]) - hot
        slope = features.T @ error + penalty * weights
        return float(value), np.concatenate([slope.ravel(), error.sum(axis=0)])

    start = np.zeros(width * kinds + kinds)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x
    return SoftmaxClassifier(
        names, found[: width * kinds].reshape(width, kinds), found[width * kinds :]
    )
