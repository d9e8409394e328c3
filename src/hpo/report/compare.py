"""Statistics of two classifiers on the same images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its confidence interval."""

    value: float
    low: float
    high: float


def paired_bootstrap(
    first: NDArray[np.floating],
    second: NDArray[np.floating],
    *,
    seed: int,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Mean of first - second over the images, with a percentile interval (Efron & Tibshirani 1993, ch. 13).

    first and second are (n,) correctness in [0, 1] of two classifiers on the same n images; whole images are drawn
    again, so what is hard for both cancels.
    """
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    values, counts = np.unique(difference, return_counts=True)
    # Drawing n images again is drawing how often each distinct difference comes: one multinomial.
    drawn = np.random.default_rng(seed).multinomial(len(difference), counts / len(difference), size=resamples)
    means = drawn @ values / len(difference)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(difference.mean()), float(low), float(high))
