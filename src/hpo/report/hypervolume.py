"""The hypervolume of the trials of a search with several objectives, in the order in which they ended."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hpo.records import StudyResult

Floats = NDArray[np.float64]

_COSTS = ("parameters", "latency_ms")  # their differences are compared as ratios


def hypervolume(costs: Floats, reference: Sequence[float]) -> float:
    """The volume that the rows of costs (points, objectives) dominate, up to the reference point; less is better.

    By slicing along the last objective (Zitzler & Thiele 1998, "Multiobjective Optimization Using Evolutionary
    Algorithms"), which is exact and fast for the few objectives of a study.
    """
    end = np.asarray(reference, dtype=float)
    inside = costs[(costs < end).all(axis=1)]
    if not len(inside):
        return 0.0
    if inside.shape[1] == 1:
        return float(end[0] - inside.min())
    ordered = inside[np.argsort(inside[:, -1], kind="stable")]
    levels = [*ordered[:, -1], end[-1]]
    slices = (
        (levels[index + 1] - levels[index]) * hypervolume(ordered[: index + 1, :-1], list(end[:-1]))
        for index in range(len(ordered))
        if levels[index + 1] > levels[index]
    )
    return float(sum(slices))


def hypervolume_history(study: StudyResult) -> list[tuple[int, float]]:
    """(trial, hypervolume so far) after each complete feasible trial of the search, in the order of their ends.

    It is a share in [0, 1] of the box between the best and the worst value of each objective among these trials, the
    worst values being the reference point. parameters and latency_ms are on a logarithmic scale. It is empty with one
    objective, or where all trials agree in one. Shares of two studies have different boxes.
    """
    done = [trial for trial in study.ranked() if trial.result is not None and trial.result.values]
    done.sort(key=lambda trial: (trial.started + trial.run_seconds, trial.number))
    if len(study.objectives) < 2 or not done:
        return []
    columns = []
    for index, (score, direction) in enumerate(study.objectives):
        values = [trial.result.values[index] for trial in done if trial.result is not None]
        if score in _COSTS and min(values) > 0:
            values = list(map(math.log, values))
        columns.append([-value if direction == "maximize" else value for value in values])
    costs = np.array(columns).T
    low, high = costs.min(axis=0), costs.max(axis=0)
    if (low == high).any():
        return []
    costs = (costs - low) / (high - low)
    ends = [1.0] * costs.shape[1]
    return [(trial.number, hypervolume(_front(costs[: index + 1]), ends)) for index, trial in enumerate(done)]


def _front(costs: Floats) -> Floats:
    """The rows that no other dominates: the others add no volume."""
    dominated = [((costs <= row).all(axis=1) & (costs < row).any(axis=1)).any() for row in costs]
    return np.unique(costs[~np.array(dominated)], axis=0)
