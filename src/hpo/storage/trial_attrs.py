"""Our two records on a trial in Optuna's hands: what was known before it ended, and how it ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from hpo.records import TrialResult, TrialState
from hpo.storage.reader import RESULT, START

_STATES = {
    optuna.trial.TrialState.WAITING: TrialState.WAITING,
    optuna.trial.TrialState.RUNNING: TrialState.RUNNING,
    optuna.trial.TrialState.COMPLETE: TrialState.COMPLETE,
    optuna.trial.TrialState.PRUNED: TrialState.PRUNED,
    optuna.trial.TrialState.FAIL: TrialState.FAILED,
}


def key_of(values: Mapping[str, Any]) -> str:
    """Equal for equal candidates, whatever the order of their places; floats to 12 digits: steps add up otherwise."""
    return json.dumps({path: _plain(value) for path, value in values.items()}, sort_keys=True)


def _plain(value: Any) -> Any:
    return float(f"{value:.12g}") if isinstance(value, float) else value


@dataclass(frozen=True)
class Start:
    """What is known of a trial before it ends.

    retry_of is the number of the interrupted or failed trial that this one repeats; deaths counts the tries so far
    whose process died. parameters is None until they are drawn. lease names the supervisor that answers for the trial.
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

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types."""
        return asdict(self)


def start_of(trial: FrozenTrial) -> Start:
    """The start record of a trial; one that was added through Optuna itself gets what can be known."""
    known = trial.user_attrs.get(START)
    return Start(**known) if known else Start(ordinal=trial.number, parameters=trial.params or None)


def stage_of(trial: FrozenTrial) -> str | None:
    """The stage of a trial, without reading all of its record."""
    stage: str | None = trial.user_attrs.get(START, {}).get("stage")
    return stage


def result_of(trial: FrozenTrial) -> TrialResult | None:
    """The result record of a trial, once there is one."""
    known = trial.user_attrs.get(RESULT)
    return TrialResult.from_json(known) if known else None


def state_of(trial: FrozenTrial) -> TrialState:
    """Optuna knows no interrupted trials: they have failed there, and our record tells them apart."""
    return TrialState.STOPPED if _stopped(trial) else _STATES[trial.state]


def _stopped(trial: FrozenTrial) -> bool:
    failed = trial.state is optuna.trial.TrialState.FAIL
    return failed and bool(trial.user_attrs.get(RESULT, {}).get("state") == TrialState.STOPPED)


def retry_of(trial: FrozenTrial) -> int | None:
    """The number of the trial that this one repeats, without reading all of its record."""
    original: int | None = trial.user_attrs.get(START, {}).get("retry_of")
    return original
