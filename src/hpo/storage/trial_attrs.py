"""The records that hpo keeps in Optuna's tables: one on each study, two on each trial. Optuna is not loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hpo.records import Candidate, Trial, TrialResult, TrialState

if TYPE_CHECKING:
    from datetime import datetime

    from optuna.trial import FrozenTrial

# Keys of a study's attributes: its record; a token of the last request to stop; the number of trials that a supervisor
# has claimed to summarise.
STUDY, STOP, CLAIM = "hpo.study", "hpo.stop", "hpo.claim"
# Keys of a trial's attributes: TrialAttrs and TrialResult.
START, RESULT = "hpo.start", "hpo.result"
# How often a trial has been paused, while it is; 0 while it runs again. For Optuna it runs all the time.
PAUSE = "hpo.pause"
# The lease of a trial that a program of the user's own has: nobody here knows whether that lives.
ASKED = "asked"

_STATES = {
    "WAITING": TrialState.WAITING,
    "RUNNING": TrialState.RUNNING,
    "COMPLETE": TrialState.COMPLETE,
    "PRUNED": TrialState.PRUNED,
    "FAIL": TrialState.FAILED,
}


def key_of(values: Mapping[str, Any]) -> str:
    """A text that is equal for equal candidates, in any order of their paths.

    Floats are rounded to 12 digits, because sums of steps differ in the last ones.
    """
    return json.dumps({path: _rounded(value) for path, value in values.items()}, sort_keys=True)


def final_key(settings: Mapping[str, Any]) -> str:
    """A text that is equal for final trainings with equal settings; how often one is saved makes no difference."""
    changed = {path: value for path, value in settings.get("set", {}).items() if path != "training.checkpoint"}
    return key_of({**settings, "set": changed})


def _rounded(value: Any) -> Any:
    return float(f"{value:.12g}") if isinstance(value, float) else value


@dataclass(frozen=True)
class TrialAttrs:
    """The part of a trial that is known before it ends.

    retry_of is the number of the interrupted or failed trial that this one repeats. deaths counts the earlier attempts
    whose process died. parameters is None until they are drawn. lease names the supervisor that owns the trial.
    final is that of Candidate.
    """

    ordinal: int
    attempt: int = 1
    deaths: int = 0
    retry_of: int | None = None
    stage: str | None = None
    seed: int = 0
    parameters: Mapping[str, Any] | None = None
    worker: str = ""
    lease: str = ""
    final: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types."""
        plain = asdict(self)
        if self.final is None:  # what earlier versions do not know is only where it is needed
            del plain["final"]
        return plain

    def candidate(self, number: int) -> Candidate:
        """The candidate of the trial with this number."""
        return Candidate(
            number, self.ordinal, self.parameters or {}, self.seed, self.attempt, self.stage, self.deaths, self.final
        )


def plain_attrs(result: TrialResult) -> dict[str, str | float]:
    """What Optuna's own tools show of a result next to its value: small attributes that nothing here reads."""
    facts = {
        "best_epoch": result.best_epoch,
        "parameter_count": result.parameter_count,
        "training_seconds": round(result.seconds, 3),
        "failure": result.failure.value if result.failure else "",
    }
    return {name: fact for name, fact in facts.items() if fact}


def attrs_of(trial: FrozenTrial) -> TrialAttrs:
    """The attributes of a trial; default ones for a trial that was added through Optuna itself."""
    stored = trial.user_attrs.get(START)
    return TrialAttrs(**stored) if stored else TrialAttrs(ordinal=trial.number, parameters=trial.params or None)


def pauses_of(trial: FrozenTrial) -> int:
    """How often a trial has been paused, if it is; else 0."""
    return int(trial.user_attrs.get(PAUSE) or 0) if trial.state.name == "RUNNING" else 0


def held_of(grown: Sequence[Mapping[str, Any]], number: int) -> dict[str, Any]:
    """What the parameters that a study has gained since this trial were fixed to; grown is that of the record."""
    # The earliest growth that names a parameter knows what it was before.
    entries = [entry for entry in reversed(grown) if number < entry["before"]]
    return {path: value for entry in entries for path, value in entry["held"].items()}


def stage_of(trial: FrozenTrial) -> str | None:
    """The stage of a trial, without parsing its whole record."""
    stage: str | None = trial.user_attrs.get(START, {}).get("stage")
    return stage


def ordinal_of(trial: FrozenTrial) -> int:
    """The trial's place among the candidates of the study, without parsing its whole record."""
    ordinal: int = trial.user_attrs.get(START, {}).get("ordinal", trial.number)
    return ordinal


def retry_of(trial: FrozenTrial) -> int | None:
    """The number of the trial that this one repeats, without parsing its whole record."""
    original: int | None = trial.user_attrs.get(START, {}).get("retry_of")
    return original


def result_of(trial: FrozenTrial) -> TrialResult | None:
    """The stored result of a trial, if there is one."""
    stored = trial.user_attrs.get(RESULT)
    return TrialResult.from_json(stored) if stored else None


def state_of(trial: FrozenTrial) -> TrialState:
    """The state of a trial. Optuna has no state for interrupted trials: they failed there, our result differs."""
    return read_state(trial.state.name, trial.user_attrs.get(RESULT), trial.user_attrs.get(PAUSE))


def read_state(name: str, result: Mapping[str, Any] | None, pauses: int | None) -> TrialState:
    """The state of a trial from the name of Optuna's state, the stored result, and what is stored as PAUSE."""
    if name == "RUNNING" and pauses:
        return TrialState.PAUSED
    if name == "FAIL" and result and result.get("state") == TrialState.STOPPED:
        return TrialState.STOPPED
    return _STATES[name]


def make_trial(
    attrs: TrialAttrs,
    number: int,
    state: TrialState,
    result: TrialResult | None,
    begun: datetime | None,
    ended: datetime | None,
) -> Trial:
    """A trial as the other rooms know it. begun and ended are in local time, as Optuna stores them."""
    return Trial(
        candidate=attrs.candidate(number),
        state=state,
        result=result,
        started=begun.timestamp() if begun else 0.0,
        run_seconds=(ended - begun).total_seconds() if begun and ended else 0.0,
        worker=attrs.worker,
    )


def to_trial(trial: FrozenTrial) -> Trial:
    """Optuna's trial as the other rooms know it."""
    begun, ended = trial.datetime_start, trial.datetime_complete
    return make_trial(attrs_of(trial), trial.number, state_of(trial), result_of(trial), begun, ended)
