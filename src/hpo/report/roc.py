"""Receiver operating characteristics: how many true finds for how many false alarms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Roc:
    """One curve: (points,) false and true positive rates in [0, 1], from (0, 0) to (1, 1), and the area below it."""

    false_rate: NDArray[np.float64]
    true_rate: NDArray[np.float64]
    area: float


def roc(positive: NDArray[np.bool_], score: NDArray[np.floating]) -> Roc | None:
    """positive (n,) bool, score (n,) higher where a positive is likelier -> the curve; None without both kinds.

    Equal scores are one step; the area is the trapezoids' (ties count half), as in Hanley & McNeil 1982. Points on a
    straight line are left out, so that the curve of many images stays small.
    """
    positives = int(np.count_nonzero(positive))
    negatives = len(positive) - positives
    if not positives or not negatives:
        return None
    order = np.argsort(-score, kind="stable")
    ends = np.r_[np.flatnonzero(np.diff(score[order])), len(score) - 1]
    hits = np.cumsum(positive[order])[ends]
    true = np.r_[0, hits]
    false = np.r_[0, 1 + ends - hits]
    area = float(np.trapezoid(true, false)) / (positives * negatives)
    corner = np.r_[True, np.diff(true)[1:] * np.diff(false)[:-1] != np.diff(true)[:-1] * np.diff(false)[1:], True]
    return Roc(false[corner] / negatives, true[corner] / positives, area)


def roc_per_class(labels: NDArray[np.integer], probabilities: NDArray[np.floating]) -> list[Roc | None]:
    """labels (n,), probabilities (n, classes) -> each class against all others; None for a class without images."""
    return [roc(labels == index, probabilities[:, index]) for index in range(probabilities.shape[1])]
