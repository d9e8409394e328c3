"""Results of trials: how one is recorded, tried again or closed."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from hpo.records import AFTER_SEARCH, FINAL, FailureKind, TrialResult, TrialState
from hpo.search.constraints import aims, judge, violations
from hpo.search.stages import stage_names
from hpo.spec.study import StudySpec
from hpo.storage.optuna_private import CONSTRAINT, FIXED, RUNG, trial_id_of
from hpo.storage.optuna_storage import Storage
from hpo.storage.trial_attrs import (
    PAUSE,
    RESULT,
    START,
    TrialAttrs,
    attrs_of,
    final_key,
    key_of,
    plain_attrs,
    result_of,
    stage_of,
    state_of,
)

_MOST_DEATHS = 3
_UNBOUNDED = 1e6  # Optuna wants finite violations
_JUDGED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.PAUSED)  # they have scores
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
        self._storage = storage
        self._id = study_id
        self._lease = lease

    def finish(self, trial: FrozenTrial, result: TrialResult, *, died: bool = False) -> TrialResult:
        """Record the result, enqueue a retry if the trial was interrupted, and end the trial.

        In this order: after a kill between two of these steps, reap can do the rest. died: its process died, which a
        candidate may three times. A trial that is paused does not end. Returns the result as it was recorded.
        """
        deaths = attrs_of(trial).deaths + died
        result = final_result(self._spec, result, final=stage_of(trial) in AFTER_SEARCH, deaths=deaths)
        database, trial_id = self._storage.database, trial_id_of(trial)
        for name, value in plain_attrs(result).items():
            database.set_trial_user_attr(trial_id, name, value)
        database.set_trial_user_attr(trial_id, RESULT, result.to_json())
        if result.state is TrialState.STOPPED and trial.number not in self._storage.index(self._id).retried:
            self.retry(trial, deaths=deaths)
        if result.state in _JUDGED and stage_of(trial) not in AFTER_SEARCH:
            for text, amount in violations(self._spec, result.scores).items():
                # As trial.set_constraint of Optuna does; there is no Optuna trial where its process died.
                database.set_trial_system_attr(trial_id, f"{CONSTRAINT}{text}", min(amount, _UNBOUNDED))
        if result.state is TrialState.PAUSED:
            if self._storage.shared:  # a short training has none, and others are to know when its supervisor dies
                database.record_heartbeat(trial_id)
            database.set_trial_user_attr(trial_id, PAUSE, result.pauses)
            return result
        values = _objective_values(self._spec, result) if result.state is TrialState.COMPLETE else None
        if values and stage_of(trial) in AFTER_SEARCH:
            # Optuna takes no NaN, and these values are compared nowhere in it.
            values = [value if _is_finite(value) else 0.0 for value in values]
        self._storage.end_trial(trial, _OPTUNA_STATES[result.state], values)
        return result

    def end_paused(self, trial: FrozenTrial) -> TrialResult:
        """End a paused trial as pruned, with the result that it had when it was paused."""
        result = result_of(trial) or TrialResult(trial.number, TrialState.PRUNED)
        return self.finish(trial, replace(result, state=TrialState.PRUNED, ended=time.time()))

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

    def enqueue_finals(self, candidates: Sequence[tuple[Mapping[str, Any], int]]) -> None:
        """Enqueue final trainings with these (parameters, seed) and the spec's settings, unless they were before.

        Those that wait with other settings end: nobody asks for them any more.
        """
        settings = self._spec.final.settings if self._spec.final else None
        finals = [trial for trial in self._storage.every_trial(self._id) if stage_of(trial) == FINAL]
        ordinal = sum(attrs_of(trial).retry_of is None for trial in finals)
        enqueued = set()
        for trial in finals:
            attrs, state = attrs_of(trial), state_of(trial)
            alike = attrs.final is None or final_key(attrs.final) == final_key(settings or {})
            if state is TrialState.WAITING and not alike:
                self._drop(trial, "it waited, and `final` has other settings now")
            elif alike and state is not TrialState.STOPPED:  # what was interrupted waits again, or was dropped
                enqueued.add((key_of(attrs.parameters or {}), attrs.seed))
        for parameters, seed in candidates:
            if (key_of(parameters), seed) not in enqueued:
                enqueued.add((key_of(parameters), seed))
                attrs = TrialAttrs(ordinal, stage=FINAL, seed=seed, parameters=dict(parameters), final=settings)
                self.enqueue(replace(attrs, lease=self._lease))
                ordinal += 1

    def _drop(self, trial: FrozenTrial, reason: str) -> None:
        """End a trial that waits, without another try."""
        result = TrialResult(trial.number, TrialState.STOPPED, reason=reason, failure=FailureKind.INTERRUPTED)
        self._storage.database.set_trial_user_attr(trial_id_of(trial), RESULT, result.to_json())
        self._storage.end_trial(trial, optuna.trial.TrialState.FAIL, None)

    def add(self, stage: str, result: TrialResult, final: Mapping[str, Any]) -> TrialResult:
        """Create a trial of a stage after the search and end it with this result, which gets its number.

        final is what the record keeps of the study's `final`: the split whose validation images judge it.
        """
        ordinal = sum(stage_of(trial) == stage for trial in self._storage.every_trial(self._id))
        attrs = TrialAttrs(ordinal, stage=stage, parameters={}, lease=self._lease, final=final)
        trial = self._storage.create_trial(self._id, template(optuna.trial.TrialState.RUNNING, attrs, {}))
        return self.finish(trial, replace(result, number=trial.number))

    def retry_failed(self) -> int:
        """Enqueue every failed candidate of the spec's stages again; returns their number."""
        trials = self._storage.every_trial(self._id)
        retried = {attrs_of(trial).retry_of for trial in trials}
        stages = {*stage_names(self._spec), FINAL}
        index = self._storage.index(self._id)
        failed = [
            seen
            for trial in trials
            if state_of(trial) is TrialState.FAILED and trial.number not in retried and stage_of(trial) in stages
            if (seen := index.seen(trial)) is not None
        ]
        for trial in failed:
            self.retry(trial, deaths=0)
        return len(failed)


def final_result(spec: StudySpec, result: TrialResult, *, final: bool = False, deaths: int = 0) -> TrialResult:
    """The result as it is recorded, from what a worker or a supervisor reports; applied twice, it changes nothing more.

    The objective becomes the value, unless one is given, and constraints decide what is feasible. A complete trial
    without a finite value for each objective fails, and so does one that was stopped when its process had died three
    times. final: it is a final training, which may have no validation scores besides its given value.
    """
    if result.state in _JUDGED and not result.values:
        value = result.scores.get(aims(spec)[0][0]) if result.value is None else result.value
        result = judge(spec, replace(result, value=value))
    if result.state is TrialState.COMPLETE:
        values = _objective_values(spec, result)[: 1 if final else None]
        odd = next((index for index, value in enumerate(values) if not _is_finite(value)), None)
        if odd is not None:
            reason = f"the objective {aims(spec)[odd][0]} is {values[odd]}, not a finite number"
            kind = FailureKind.NOT_FINITE
            return replace(result, state=TrialState.FAILED, value=None, values=(), reason=reason, failure=kind)
    if result.state is TrialState.STOPPED and deaths >= _MOST_DEATHS:
        reason = f"interrupted {deaths} times: its process died each time; the last time: {result.reason}"
        return replace(result, state=TrialState.FAILED, reason=reason, failure=FailureKind.WORKER_DIED)
    return result


def misfit(number: int, error: Exception) -> TrialResult:
    """The result of a candidate whose values do not fit together, which samplers then learn to leave alone."""
    # As with too many parameters: no failure.
    return TrialResult(number, TrialState.PRUNED, reason=str(error), feasible=False, ended=time.time())


def reused(earlier: TrialResult, number: int) -> TrialResult:
    """The result of the trial of this number, whose candidate an earlier trial had."""
    reason = f"same candidate as trial {earlier.number}"
    new = replace(earlier, number=number, epochs=(), seconds=0.0, folder="", reason=reason, traceback="")
    return replace(new, ended=time.time())


def _objective_values(spec: StudySpec, result: TrialResult) -> list[float | None]:
    """One value for each objective."""
    if not spec.search.objectives:
        return [result.value]
    return list(result.values) or [None for _ in spec.search.objectives]


def template(
    state: optuna.trial.TrialState, attrs: TrialAttrs, fixed: Mapping[str, Any], notes: Mapping[str, Any] | None = None
) -> FrozenTrial:
    """A trial to be created, with these attributes and fixed values."""
    return optuna.trial.create_trial(
        state=state, user_attrs={START: attrs.to_json()}, system_attrs={**(notes or {}), FIXED: dict(fixed)}
    )


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
