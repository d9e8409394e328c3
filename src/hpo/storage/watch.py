"""Watch a study that other processes run: its changes since the last call, as events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from hpo.database import Reader, reading
from hpo.home import Home
from hpo.records import FINAL, Event, StudyResult, Trial, TrialEnded, TrialResult, TrialStarted, TrialState
from hpo.storage.liveness import host_of
from hpo.storage.reader import read_trial, trial_rows
from hpo.storage.trial_attrs import CLAIM, RESULT, START, STOP


class StudyWatcher:
    """A read-only view of one generation of a study, from the state `before` on.

    finished is the number of finished trials of the search. over: all its supervisors have ended, and one has claimed
    to summarise it. renewed: there are new trials since `before`. stopped: `hpo stop` was called since the first call
    of new_events, which updates all of them.
    """

    def __init__(self, home: Home, before: StudyResult) -> None:
        self.over = self.renewed = self.stopped = False
        self._home, self._title, self._count = home, before.title, len(before.trials)
        self._sign = -1.0 if before.direction == "maximize" else 1.0
        self._best = before.best.value if before.best else None
        self._states: dict[int, str] = {}
        self._started = {trial.number for trial in before.trials}
        self._finished = {trial.candidate.ordinal for trial in before.counted if trial.state.finished}
        self._ended = {trial.number for trial in before.trials if _has_ended(trial)}
        self._stop: Any = None
        self._called = False

    @property
    def finished(self) -> int:
        """The number of finished candidates of the search."""
        return len(self._finished)

    def new_events(self) -> list[Event]:
        """TrialStarted and TrialEnded for the changes since the last call. Raises StoreError."""
        with reading(self._home.storage_url) as reader:
            if reader is None:
                return []
            ids = reader.rows("SELECT study_id FROM studies WHERE study_name = :title", title=self._title)
            if not ids:
                return []
            ((study,),) = ids
            query = (
                "SELECT key, value_json FROM study_user_attributes WHERE study_id = :study AND key IN (:stop, :claim)"
            )
            attributes = {
                key: json.loads(text) for key, text in reader.rows(query, study=study, stop=STOP, claim=CLAIM)
            }
            rows = trial_rows(reader, study)
            events = [event for row in rows for event in self._changes(reader, row)]
        self.over, self.renewed = attributes.get(CLAIM) == len(rows), len(rows) > self._count
        self._stop = self._stop if self._called else attributes.get(STOP)
        self._called, self.stopped = True, attributes.get(STOP) != self._stop
        return events

    def _changes(self, reader: Reader, row: Any) -> Iterator[Event]:
        key, number, state = row[:3]
        if self._states.get(number) == state or number in self._ended:
            return
        query = "SELECT key, value_json FROM trial_user_attributes WHERE trial_id = :trial AND key IN (:start, :result)"
        records = {name: json.loads(text) for name, text in reader.rows(query, trial=key, start=START, result=RESULT)}
        start = records.get(START) or {}
        trial = read_trial(row, start, records.get(RESULT))
        if trial.state is TrialState.RUNNING and not start.get("worker"):
            return  # it is just being created
        self._states[number] = state
        if trial.state is TrialState.WAITING:
            self._finished.discard(trial.candidate.ordinal)
            return
        if number not in self._started:
            self._started.add(number)
            yield TrialStarted(trial.candidate, f"{host_of(start.get('lease', ''))}: {trial.worker}")
        if _has_ended(trial):
            self._ended.add(number)
            yield self._end(trial)

    def _end(self, trial: Trial) -> TrialEnded:
        result = trial.result or TrialResult(trial.number, trial.state)
        if trial.candidate.stage == FINAL:
            return TrialEnded(result)
        if trial.state.finished:
            self._finished.add(trial.candidate.ordinal)
        value = result.value if trial.state is TrialState.COMPLETE and result.feasible else None
        best = value is not None and (self._best is None or self._sign * value < self._sign * self._best)
        self._best = value if best else self._best
        return TrialEnded(replace(result, number=trial.number), best=best)


def _has_ended(trial: Trial) -> bool:
    return trial.state not in (TrialState.WAITING, TrialState.RUNNING)
