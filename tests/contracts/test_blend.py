"""The largest weight of a blend against a bisection over its definition, one by one and side by side."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from omcda_deploy.blend import UNIT, Gaussians, Joined, Logits, largest_weights
from omcda_deploy.serve.guarded_row import gaussian_curve, largest_weight, logits_curve

ROWS = 300
SIZES = (1, 4, 2)
Float64 = NDArray[np.float64]


def gaussian_kl(w: float, mean: Any, std: Any, mean_b: Any, std_b: Any) -> float:
    """KL(pi_w || pi_b), with pi_w from the product of densities."""
    precision, precision_b = std**-2.0, std_b**-2.0
    mixed = (1.0 - w) * precision_b + w * precision
    center = ((1.0 - w) * precision_b * mean_b + w * precision * mean) / mixed
    ratio = precision_b / mixed
    return float(0.5 * (ratio + precision_b * (center - mean_b) ** 2 - 1.0 - np.log(ratio)).sum())


def logits_kl(w: float, logits: Any, logits_b: Any) -> float:
    scores = (1.0 - w) * logits_b + w * logits
    log_probs = scores - scores.max()
    log_probs -= math.log(np.exp(log_probs).sum())
    return float((np.exp(log_probs) * (log_probs - logits_b)).sum())


def bisection(kl: Callable[[float], float], threshold: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if kl(middle) <= threshold else (low, middle)
    return low


def log_softmax(scores: Float64) -> Float64:
    shifted = scores - scores.max(-1, keepdims=True)
    normalised: Float64 = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalised


@pytest.mark.parametrize("share", [1e-4, 0.3, 0.999])  # of KL(pi || pi_b)
@pytest.mark.parametrize("spread", [0.2, 1.0, 2.5])
def test_gaussian_weights_are_those_of_a_bisection(share: float, spread: float) -> None:
    generator = np.random.default_rng(1)
    joined = Joined.of(SIZES)
    mean, mean_b = spread * generator.normal(size=(2, ROWS, sum(SIZES)))
    log_std, log_std_b = 0.7 * spread * generator.normal(size=(2, ROWS, sum(SIZES))) - 1.0
    parts = list(joined.slices())

    def kl_of(row: int, part: slice) -> Callable[[float], float]:
        at = (row, part)
        return lambda w: gaussian_kl(w, mean[at], np.exp(log_std[at]), mean_b[at], np.exp(log_std_b[at]))

    thresholds = share * np.array([[kl_of(row, part)(1.0) for part in parts] for row in range(ROWS)])
    many = largest_weights(Gaussians(joined, mean, log_std, mean_b, log_std_b), thresholds)
    for row in range(ROWS):
        for index, part in enumerate(parts):
            threshold = float(thresholds[row, index])
            precision, precision_b = np.exp(-2.0 * log_std[row, part]), np.exp(-2.0 * log_std_b[row, part])
            moments = zip(mean[row, part], precision, mean_b[row, part], precision_b, strict=True)
            single = largest_weight(*gaussian_curve([tuple(map(float, m)) for m in moments]), threshold)  # type: ignore[misc]
            expected = bisection(kl_of(row, part), threshold)
            # Rounding errors of a KL of 1e-5 nats are some units.
            tolerance = 0.0 if threshold > 1e-3 else 1e-6 * expected + 8 * UNIT
            assert abs(many[row, index] - expected) <= tolerance
            assert abs(single - expected) <= tolerance


@pytest.mark.parametrize("share", [1e-3, 0.3, 0.95])
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_categorical_weights_are_those_of_a_bisection(share: float, spread: float) -> None:
    generator = np.random.default_rng(2)
    joined = Joined.of(sizes := (3, 5))
    logits, logits_b = np.empty((2, ROWS, sum(sizes)))
    parts = list(joined.slices())
    for part in parts:
        for values in (logits, logits_b):
            scores = spread * generator.normal(size=(ROWS, part.stop - part.start))
            scores[::3, 0] = -1e9  # masked
            values[:, part] = log_softmax(scores)
    full = np.array(
        [[logits_kl(1.0, logits[row, part], logits_b[row, part]) for part in parts] for row in range(ROWS)]
    )
    thresholds = share * full
    many = largest_weights(Logits(joined, logits, logits_b), thresholds)
    for row in range(ROWS):
        for index, part in enumerate(parts):
            threshold = float(thresholds[row, index])
            policy, behavior = logits[row, part], logits_b[row, part]
            single = largest_weight(*logits_curve(policy.tolist(), behavior.tolist()), threshold)
            expected = bisection(lambda w, p=policy, b=behavior: logits_kl(w, p, b), threshold)  # type: ignore[misc]
            tolerance = 2 * UNIT if threshold > 1e-3 else 1e-5 * expected + 8 * UNIT
            assert abs(many[row, index] - expected) <= tolerance
            assert abs(single - expected) <= tolerance


def test_weights_at_the_ends() -> None:
    """A threshold of 0 trusts the behaviour policy alone; so does a policy that is that, and what overflows."""
    joined = Joined.of((1,))

    def both(mean: float, log_std: float, threshold: float) -> set[float]:
        zero = np.zeros((1, 1))
        gaussians = Gaussians(joined, np.full((1, 1), mean), np.full((1, 1), log_std), zero, zero)
        many = float(largest_weights(gaussians, np.full((1, 1), threshold))[0, 0])
        moments = [(mean, float(np.exp(-2.0 * log_std)), 0.0, 1.0)]
        return {many, largest_weight(*gaussian_curve(moments), threshold)}

    with np.errstate(all="ignore"):
        assert both(1.0, 0.0, 0.0) == {0.0}
        assert both(0.0, 0.0, 0.1) == {0.0}
        assert both(1e200, 0.0, 0.1) == {0.0}
        assert both(1.0, -400.0, 0.1) == {0.0}
        assert both(1.0, 0.0, 1e9) == {
            1.0 - UNIT
        }  # the graph said that the threshold is exceeded, by rounding
        assert both(2.0, 0.0, 0.5) == {0.5}
