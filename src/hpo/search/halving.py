"""Successive halving: the rungs that a trial has reached, and which trials of a rung are the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from hpo.search.constraints import aims
from hpo.spec.automatic import chosen_pruner
from hpo.spec.study import StudySpec
from hpo.storage.optuna_private import RUNG, domination_ranks, trial_id_of
from hpo.storage.stage_view import StageView

Floats = NDArray[np.float64]


def best_first(costs: Floats) -> list[int]:
    """The rows of costs (trials, objectives), the best first; less is better, and of equal rows the first.

    With several objectives: front by front of non-dominated rows, and within a front so that its first rows are spread
    over it, an epsilon-net: the best in the first objective, then each time the one farthest from those before it
    (Schmucker et al. 2021, "Multi-objective Asynchronous Successive Halving"). Distances are those of ranks, since
    objectives have different units.
    """
    if costs.shape[1] == 1:
        return [int(row) for row in np.argsort(costs[:, 0], kind="stable")]
    fronts = domination_ranks(costs, least=len(costs))
    places = np.column_stack([np.unique(column, return_inverse=True)[1] for column in costs.T]).astype(float)
    places /= np.maximum(places.max(axis=0), 1.0)
    order: list[int] = []
    for front in range(int(fronts.max()) + 1):
        order += _spread(np.flatnonzero(fronts == front), places)
    return order


def _spread(rows: NDArray[np.intp], places: Floats) -> list[int]:
    left = [int(row) for row in rows[np.argsort(places[rows, 0], kind="stable")]]
    chosen = left[:1]
    far = np.full(len(places), math.inf)
    left = sorted(left[1:])
    while left:
        far = np.minimum(far, np.linalg.norm(places - places[chosen[-1]], axis=1))
        chosen.append(max(left, key=lambda row: (far[row], -row)))
        left.remove(chosen[-1])
    return chosen


def signs_of(spec: StudySpec) -> Floats:
    """(objectives,): -1 where more is better, so that the products with values are costs."""
    return np.array([-1.0 if direction == "maximize" else 1.0 for _, direction in aims(spec)])


def rungs_within(before: int, last: int, *, first: int, factor: int) -> list[int]:
    """The steps of the rungs after one step, up to another: first, first * factor, ..."""
    found, rung = [], first
    while rung <= last:
        found += [rung] * (rung > before)
        rung *= factor
    return found


def noted_values(notes: Mapping[str, Any]) -> dict[int, tuple[float, ...]]:
    """Step of a rung -> the values that ParetoHalving has noted there in the system attributes of a trial."""
    return {int(key.removeprefix(RUNG)): tuple(value) for key, value in notes.items() if key.startswith(RUNG)}


def rung_values(reported: Mapping[int, float], *, first: int, factor: int) -> dict[int, float]:
    """Step of a rung -> the value of a trial there, from step (counted from 1) -> value.

    That is its first report from there on, as Optuna has it; a rung where that is NaN is left out.
    """
    found = {}
    for rung in rungs_within(0, max(reported, default=0), first=first, factor=factor):
        step = rung if rung in reported else min(step for step in reported if step >= rung)
        if not math.isnan(reported[step]):
            found[rung] = reported[step]
    return found


class Halving(optuna.pruners.BasePruner):  # type: ignore[misc]
    """Asynchronous successive halving, for one objective: by the rule of Optuna's pruner, from the values at each rung.

    Optuna's notes a value with the index of its rung, and would compare values of different epochs once a study is
    resumed with another first rung or factor. Rungs are at the steps first, first * factor, ...; steps count from 1.
    """

    def __init__(self, *, first: int, factor: int) -> None:
        self._first, self._factor = first, factor

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether to end the trial now."""
        last, reported = trial.last_step or 0, trial.intermediate_values
        before = max((step for step in reported if step < last), default=0)
        if not (due := rungs_within(before, last, first=self._first, factor=self._factor)):
            return False
        if math.isnan(reported[last]):
            return True
        sign = 1.0 if study.direction is StudyDirection.MAXIMIZE else -1.0
        others = [other for other in study.get_trials(deepcopy=False) if other.number != trial.number]
        reached = [rung_values(each.intermediate_values, first=self._first, factor=self._factor) for each in others]
        competing = ([sign * each[rung] for each in reached if rung in each] for rung in due)
        return not all(self._continues(sign * reported[last], values) for values in competing)

    def _continues(self, own: float, others: Sequence[float]) -> bool:
        """Whether it is among the best n // factor of the n trials of a rung, or the best; more is better."""
        better = sum(other > own for other in others)
        return better < max(1, (len(others) + 1) // self._factor)


class ParetoHalving:
    """Successive halving for several objectives, with the rungs of Halving.

    A trial that reaches a rung continues if it is among the best n // factor of the n trials there, or the best. It is
    compared with the trials that had this rung: Optuna has no place for what others had at that step.
    """

    def __init__(self, spec: StudySpec) -> None:
        part, _ = chosen_pruner(spec)
        self._first, self._factor, self._signs = part.min_epochs or 1, part.reduction_factor, signs_of(spec)

    def prune(self, view: StageView, study_id: int, trial_id: int, step: int, values: Sequence[float]) -> bool:
        """Whether to end the trial after this step (counted from 1), where it has one value for each objective.

        Its values at a rung are noted in the storage. A step that is reported again is judged again.
        """
        noted = noted_values(view.get_trial_system_attrs(trial_id))
        before = max((rung for rung in noted if rung < step), default=0)
        for rung in rungs_within(before, step, first=self._first, factor=self._factor):
            if not all(map(math.isfinite, values)):
                return True
            note = f"{RUNG}{rung}"
            view.set_trial_system_attr(trial_id, note, list(values))
            trials = view.get_all_trials(study_id, deepcopy=False)
            others = [other for other in trials if note in other.system_attrs and trial_id_of(other) != trial_id]
            costs = np.array([*(other.system_attrs[note] for other in others), list(values)]) * self._signs
            if best_first(costs).index(len(others)) >= max(1, len(costs) // self._factor):
                return True
        return False
