"""How sure the scores of a page are: its images drawn again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hpo.report.statistics import Interval, paired_bootstrap, score_intervals

RESAMPLES = 2000


def confusion_intervals(confusion: Sequence[Sequence[int]], *, seed: int) -> dict[str, Interval]:
    """(true, predicted) counts -> accuracy, balanced_accuracy, macro_f1 with 95 % intervals; of no images none."""
    counts = np.asarray(confusion, dtype=np.int64)
    if not counts.sum():
        return {}
    true, predicted = (np.repeat(cells, counts.ravel()) for cells in np.indices(counts.shape).reshape(2, -1))
    own, _ = score_intervals(true, predicted[np.newaxis], classes=len(counts), seed=seed, resamples=RESAMPLES)
    return own[0]


def share_interval(share: float, count: int, *, seed: int) -> Interval:
    """A share of count images, such as an accuracy, with its 95 % interval."""
    right = np.arange(count) < round(share * count)
    return paired_bootstrap(right.astype(float), np.zeros(count), seed=seed, resamples=RESAMPLES)
