"""How a trial of the study storage ends: recorded, tried again if it was cut short, closed; and how it gets there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from hpo.records import FINAL, FailureKind, TrialResult, TrialState
from hpo.search.constraints import aims, judge, violations
from hpo.spec.study import StudySpec
from hpo.storage.optuna_storage import RESULT, START, Start, Storage, stage_of, start_of

_MOST_DEATHS = 3
_UNBOUNDED = 1e6  # Optuna wants finite violations
_OPTUNA_STATES = {
    TrialState.COMPLETE: optuna.trial.TrialState.COMPLETE,
    TrialState.PRUNED: optuna.trial.TrialState.PRUNED,
    TrialState.FAILED: optuna.trial.TrialState.FAIL,
    TrialState.STOPPED: optuna.trial.TrialState.FAIL,
}


class Settler:
    """Ends trials of one study in the name of the supervisor that has this lease."""

    def __init__(self, spec: StudySpec, storage: Storage, study: optuna.Study, *, lease: str) -> None:
        self._spec = spec
        self._storage = storage
        self._study = study
        self._id: int = study._study_id
        self._lease = lease

    def settle(self, trial: FrozenTrial, result: TrialResult, *, died: bool = False) -> TrialResult:
        """Record, enqueue, close, in this order: killed between two of them, reap can do the rest."""
        deaths = start_of(trial).deaths + died
        result = final_result(self._spec, result, final=stage_of(trial) == FINAL, deaths=deaths)
        self._storage.set_trial_user_attr(trial._trial_id, RESULT, result.to_json())
        if result.state is TrialState.STOPPED and trial.number not in self._storage.books(self._id).again:
            self.retry(trial, deaths=deaths)
        if result.state in (TrialState.COMPLETE, TrialState.PRUNED) and stage_of(trial) != FINAL:
            for text, amount in violations(self._spec, result.scores).items():
                # What trial.set_constraint writes; a trial of a dead process has no Optuna handle.
                self._storage.set_trial_system_attr(trial._trial_id, f"constraints:{text}", min(amount, _UNBOUNDED))
        values = _objective_values(self._spec, result) if result.state is TrialState.COMPLETE else None
        if values and stage_of(trial) == FINAL:
            # Nobody compares these in Optuna, and it takes no NaN.
            values = [value if _finite(value) else 0.0 for value in values]
        self._storage.end_trial(trial, _OPTUNA_STATES[result.state], values)
        return result

    def retry(self, trial: FrozenTrial, *, deaths: int) -> None:
        """Enqueue the candidate of a trial again; deaths is how many of its tries have died so far."""
        start = start_of(trial)
        # What was enqueued stays so where the rest was never drawn; a retry killed early has not all of it yet.
        fixed = {**trial.system_attrs.get("fixed_params", {}), **(trial.params if start.parameters is not None else {})}
        # What samplers noted about the candidate stays true; the rungs it reached do not.
        notes = {key: note for key, note in trial.system_attrs.items() if not key.startswith("completed_rung_")}
        retry = replace(start, attempt=start.attempt + 1, deaths=deaths, retry_of=trial.number, worker="")
        self.enqueue(replace(retry, lease=self._lease), fixed, notes)

    def enqueue(
        self, start: Start, fixed: Mapping[str, Any] | None = None, notes: Mapping[str, Any] | None = None
    ) -> None:
        """Put a candidate in the queue. fixed are values it is to have, notes what samplers know of it."""
        self._study.add_trial(template(optuna.trial.TrialState.WAITING, start, fixed or {}, notes or {}))


def final_result(spec: StudySpec, result: TrialResult, *, final: bool = False, deaths: int = 0) -> TrialResult:
    """The result as it is recorded, from what a worker or a supervisor reports; applied twice, it changes nothing more.

    The objective becomes the value, unless one is given, and constraints decide what is feasible. A complete trial
    without a finite value for each objective fails, and so does one that was stopped when its process had died three
    times. final: it is a final training, which may have no validation scores beside its given value.
    """
    if result.state in (TrialState.COMPLETE, TrialState.PRUNED) and not result.values:
        value = result.scores.get(aims(spec)[0][0]) if result.value is None else result.value
        result = judge(spec, replace(result, value=value))
    if result.state is TrialState.COMPLETE:
        values = _objective_values(spec, result)[: 1 if final else None]
        odd = next((index for index, value in enumerate(values) if not _finite(value)), None)
        if odd is not None:
            reason = f"the objective {aims(spec)[odd][0]} is {values[odd]}, not a finite number"
            kind = FailureKind.NOT_FINITE
            return replace(result, state=TrialState.FAILED, value=None, values=(), reason=reason, failure=kind)
    if result.state is TrialState.STOPPED and deaths >= _MOST_DEATHS:
        reason = f"interrupted {deaths} times: its process died each time; the last time: {result.reason}"
        return replace(result, state=TrialState.FAILED, reason=reason, failure=FailureKind.WORKER_DIED)
    return result


def _objective_values(spec: StudySpec, result: TrialResult) -> list[float | None]:
    """One value for each objective."""
    if not spec.search.objectives:
        return [result.value]
    return list(result.values) or [None for _ in spec.search.objectives]


def template(
    state: optuna.trial.TrialState, start: Start, fixed: Mapping[str, Any], notes: Mapping[str, Any] | None = None
) -> FrozenTrial:
    """A trial to be made, with its start record."""
    return optuna.trial.create_trial(
        state=state,
        user_attrs={START: start.to_json()},
        system_attrs={**(notes or {}), "fixed_params": dict(fixed)},
    )


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
