"""Paired comparisons: McNemar's test and the clustered bootstrap."""

from __future__ import annotations

import numpy as np
import pytest

from clover.core.errors import CloverError
from clover.evaluate.interval import bootstrap_means, mcnemar, paired_bootstrap


def test_mcnemar_is_the_exact_binomial_test_of_discordant_pairs() -> None:
    a = [1, 1, 1, 1, 1, 1, 0, 1, 0]
    b = [0, 0, 0, 0, 0, 0, 1, 1, 0]
    found = mcnemar(a, b)
    assert (found["only_a"], found["only_b"], found["both"], found["neither"]) == (6, 1, 1, 1)
    assert found["p_value"] == pytest.approx(2 * (1 + 7) / 2**7)
    assert mcnemar(a, a)["p_value"] == 1.0


def test_items_without_a_rating_are_left_out_of_pairs() -> None:
    assert mcnemar([1, np.nan, 0], [1, 1, np.nan])["n"] == 1
    assert paired_bootstrap([np.nan], [1.0])["n"] == 0


def test_paired_bootstrap_finds_a_difference_and_its_absence() -> None:
    rng = np.random.default_rng(0)
    b = rng.random(400) < 0.5
    a = b | (rng.random(400) < 0.3)
    found = paired_bootstrap(a, b)
    assert found["difference"] == pytest.approx(100 * (a.mean() - b.mean()))
    assert 0 < found["low"] < found["difference"] < found["high"]
    assert found["p_value"] < 0.01
    same = paired_bootstrap(b, b)
    assert (same["difference"], same["low"], same["high"], same["p_value"]) == (0, 0, 0, 1)


def test_paired_bootstrap_is_wider_over_images() -> None:
    gain = np.repeat(np.random.default_rng(1).normal(0.1, 0.3, 40), 10)
    alone = paired_bootstrap(gain, np.zeros(400))
    images = [f"{at // 10}" for at in range(400)]
    together = paired_bootstrap(gain, np.zeros(400), clusters=images)
    assert together["high"] - together["low"] > 2 * (alone["high"] - alone["low"])


def test_lists_of_two_lengths_are_refused() -> None:
    with pytest.raises(CloverError, match="one length"):
        mcnemar([1, 0], [1])


def test_bootstrap_means_agree_with_a_plain_loop() -> None:
    values = np.array([[1.0, np.nan], [0.0, 2.0], [3.0, 4.0], [5.0, np.nan]])
    clusters = np.array([0, 0, 1, 2])
    means = bootstrap_means(values, clusters, draws=200, seed=5)
    rng = np.random.default_rng(5)
    for draw in range(200):
        rows = np.concatenate(
            [np.flatnonzero(clusters == c) for c in rng.integers(0, 3, 3, np.int32)]
        )
        for column in range(2):
            drawn = values[rows, column]
            drawn = drawn[~np.isnan(drawn)]
            expected = drawn.mean() if len(drawn) else np.nan
            assert means[draw, column] == pytest.approx(expected, nan_ok=True)
