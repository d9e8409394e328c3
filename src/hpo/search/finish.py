"""The end of a trial in the study storage: recorded, tried again if it was interrupted, closed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from hpo.records import FINAL, FailureKind, TrialResult, TrialState
from hpo.search.constraints import aims, violations
from hpo.spec.study import StudySpec
from hpo.storage.optuna_private import CONSTRAINT, FIXED, RUNG, trial_id_of
from hpo.storage.optuna_storage import Storage
from hpo.storage.trial_attrs import RESULT, START, TrialAttrs, attrs_of, stage_of

_MOST_DEATHS = 3
_UNBOUNDED = 1e6  # Optuna wants finite violations
_OPTUNA_STATES = {
    TrialState.COMPLETE: optuna.trial.TrialState.COMPLETE,
    TrialState.PRUNED: optuna.trial.TrialState.PRUNED,
    TrialState.FAILED: optuna.trial.TrialState.FAIL,
    TrialState.STOPPED: optuna.trial.TrialState.FAIL,
}


class Finisher:
    """Ends trials of one study (study_id is Optuna's) in the name of the supervisor with this lease."""

    def __init__(self, spec: StudySpec, storage: Storage, study_id: int, *, lease: str) -> None:
        self._spec = spec
        self._objectives = aims(spec)
        self._storage = storage
        self._id = study_id
        self._lease = lease

    def finish(self, trial: FrozenTrial, result: TrialResult, *, died: bool = False) -> TrialResult:
        """Record the result, enqueue a retry if the trial was interrupted, and end the trial.

        In this order: after a kill between two of these steps, reap can do the rest. died: its process died, which a
        candidate may three times. Returns the result as it was recorded.
        """
        result = self._checked(result, final=stage_of(trial) == FINAL)
        deaths = attrs_of(trial).deaths + died
        if result.state is TrialState.STOPPED and deaths >= _MOST_DEATHS:
            reason = f"interrupted {deaths} times: its process died each time; the last time: {result.reason}"
            result = replace(result, state=TrialState.FAILED, reason=reason, failure=FailureKind.WORKER_DIED)
        database, trial_id = self._storage.database, trial_id_of(trial)
        database.set_trial_user_attr(trial_id, RESULT, result.to_json())
        if result.state is TrialState.STOPPED and trial.number not in self._storage.index(self._id).retried:
            self.retry(trial, deaths=deaths)
        if result.state in (TrialState.COMPLETE, TrialState.PRUNED) and stage_of(trial) != FINAL:
            for text, amount in violations(self._spec, result.scores).items():
                # As trial.set_constraint of Optuna does; there is no Optuna trial where its process died.
                database.set_trial_system_attr(trial_id, f"{CONSTRAINT}{text}", min(amount, _UNBOUNDED))
        values = self._values(result) if result.state is TrialState.COMPLETE else None
        if values and stage_of(trial) == FINAL:
            # Optuna takes no NaN, and these values are compared nowhere in it.
            values = [value if _is_finite(value) else 0.0 for value in values]
        self._storage.end_trial(trial, _OPTUNA_STATES[result.state], values)
        return result

    def _checked(self, result: TrialResult, *, final: bool) -> TrialResult:
        """The result; failed if it is complete without a finite value for each objective."""
        if result.state is not TrialState.COMPLETE:
            return result
        # A final training on all images has no validation scores: its value is that of the search.
        values = self._values(result)[: 1 if final else None]
        wrong = next((index for index, value in enumerate(values) if not _is_finite(value)), None)
        if wrong is None:
            return result
        reason = f"the objective {self._objectives[wrong][0]} is {values[wrong]}, not a finite number"
        return replace(
            result, state=TrialState.FAILED, value=None, values=(), reason=reason, failure=FailureKind.NOT_FINITE
        )

    def _values(self, result: TrialResult) -> list[float | None]:
        """One value for each objective."""
        return [result.value] if len(self._objectives) == 1 else list(result.values) or [None for _ in self._objectives]

    def retry(self, trial: FrozenTrial, *, deaths: int) -> None:
        """Enqueue the candidate of a trial again; deaths is the number of its attempts that have died so far."""
        attrs = attrs_of(trial)
        # Enqueued values remain where the others were never sampled; a retry that was killed early lacks some of them.
        fixed = {**trial.system_attrs.get(FIXED, {}), **(trial.params if attrs.parameters is not None else {})}
        # Notes of samplers on the candidate remain true; the rungs that it reached do not.
        notes = {key: note for key, note in trial.system_attrs.items() if not key.startswith(RUNG)}
        retry = replace(attrs, attempt=attrs.attempt + 1, deaths=deaths, retry_of=trial.number, worker="")
        self.enqueue(replace(retry, lease=self._lease), fixed, notes)

    def enqueue(
        self, attrs: TrialAttrs, fixed: Mapping[str, Any] | None = None, notes: Mapping[str, Any] | None = None
    ) -> None:
        """Put a candidate in the queue. fixed are values of its parameters, notes those of samplers on it."""
        self._storage.create_trial(self._id, template(optuna.trial.TrialState.WAITING, attrs, fixed or {}, notes or {}))


def template(
    state: optuna.trial.TrialState, attrs: TrialAttrs, fixed: Mapping[str, Any], notes: Mapping[str, Any] | None = None
) -> FrozenTrial:
    """A trial to be created, with these attributes and fixed values."""
    return optuna.trial.create_trial(
        state=state,
        user_attrs={START: attrs.to_json()},
        system_attrs={**(notes or {}), FIXED: dict(fixed)},
    )


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
