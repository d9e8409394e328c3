"""A callback for studies that users run with Optuna themselves: each trial becomes a run in MLflow."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpo.errors import StoreError
from hpo.home import Home
from hpo.records import TrialState
from hpo.tracking.foreign_trials import ForeignTrial, record_trials

_STATES = {"COMPLETE": TrialState.COMPLETE, "PRUNED": TrialState.PRUNED, "FAIL": TrialState.FAILED}


class OptunaCallback:
    """Records finished trials of an optuna.Study in MLflow; Optuna's storage stays the record of the study."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._reconciled: set[str] = set()

    def __call__(self, study: Any, trial: Any) -> None:
        """Record a trial that has just ended; the first call also records what earlier or killed processes have left.

        A store that does not answer does not end the study: the next call, or reconcile, writes what is missing.
        """
        first = study.study_name not in self._reconciled
        try:
            self._record(study, study.get_trials(deepcopy=False) if first else [trial])
            self._reconciled.add(study.study_name)
        except StoreError as error:
            self._reconciled.discard(study.study_name)
            logging.getLogger("hpo").warning("trial %s is not recorded yet: %s", trial.number, error)

    def reconcile(self, study: Any) -> int:
        """Record every finished trial of a study that has no run, or only half of one; returns their number.

        Raises StoreError.
        """
        return self._record(study, study.get_trials(deepcopy=False))

    def _record(self, study: Any, trials: Sequence[Any]) -> int:
        done = [_plain(trial) for trial in trials if trial.state.name in _STATES]
        directions = [direction.name.lower() for direction in study.directions]
        return record_trials(self._home, study.study_name, done, directions=directions) if done else 0


def optuna_callback(*, home: str | Path | None = None) -> OptunaCallback:
    """A callback for `study.optimize(objective, callbacks=[...])` that records each trial as a run in MLflow.

    A run has the parameters, the objectives, the values that the trial reported, by step, its state (complete, pruned
    or failed), its times and its user attributes; it lies below the run of its study, in the experiment of the study's
    name. Several processes may run one study, each with a callback of its own. What a killed process has left is
    recorded by the first call of the next one, or by `callback.reconcile(study)`. home is a project's folder, by
    default the working directory; `hpo ui` shows the runs. Raises HpoError where the folder cannot be used.
    """
    return OptunaCallback(Home.find(home).create())


def _plain(trial: Any) -> ForeignTrial:
    # Trials that were added by hand, or failed while they waited, lack one.
    times = [time.timestamp() for time in (trial.datetime_start, trial.datetime_complete) if time is not None] or [0.0]
    return ForeignTrial(
        number=trial.number,
        state=_STATES[trial.state.name],
        values=tuple(trial.values or ()),
        parameters=trial.params,
        epochs=trial.intermediate_values,
        started=times[0],
        ended=times[-1],
        notes={name: str(value) for name, value in trial.user_attrs.items()},
    )
