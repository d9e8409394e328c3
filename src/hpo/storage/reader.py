"""Read the study storage next to its writers: without a lock, without creating a file, without loading Optuna."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from hpo.database import Reader, reading, sqlite_file
from hpo.errors import StoreError, shown_address
from hpo.events import Event, TrialEnded, TrialStarted
from hpo.home import Home
from hpo.locks import seen_held
from hpo.records import AFTER_SEARCH, StudyResult, Trial, TrialResult, TrialState
from hpo.storage.liveness import GRACE_SECONDS, HEARTBEATS, Holder, holders, host_of, is_near
from hpo.storage.trial_attrs import (
    ASKED,
    CLAIM,
    PAUSE,
    RESULT,
    START,
    STOP,
    STUDY,
    TrialAttrs,
    held_of,
    make_trial,
    read_state,
)


@dataclass(frozen=True)
class StudySnapshot:
    """A study at one moment.

    holders are its living supervisors. leases maps the number of each running trial to the name of its supervisor's
    lease; abandoned are the numbers of running trials whose supervisor is dead. best is the best complete trial of the
    search, with its result.
    """

    study: StudyResult
    holders: tuple[Holder, ...]
    leases: Mapping[int, str]
    abandoned: tuple[int, ...]
    best: Trial | None = None

    @property
    def running(self) -> list[Trial]:
        """The running trials of living supervisors."""
        return [t for t in self.study.trials if t.state is TrialState.RUNNING and t.number not in self.abandoned]


def read_snapshots(home: Home, *, results: bool = True) -> list[StudySnapshot]:
    """Every generation of every study, oldest first; none where there is no storage. Raises StoreError.

    Without results, only the best trial of each study and failed trials have theirs. The results hold every epoch of
    every trial: without them 10,000 trials take a moment.
    """
    with reading(home.storage_url) as reader:
        if reader is None or "trials" not in reader.tables():
            return []
        snapshots = [
            _snapshot(home, reader, study_id, record, results=results) for study_id, record in _records(reader)
        ]
    return sorted(snapshots, key=lambda snapshot: snapshot.study.created)


def _records(reader: Reader) -> list[tuple[int, Any]]:
    """(Optuna's id, our record) of every study."""
    query = "SELECT study_id, value_json FROM study_user_attributes WHERE key = :key"
    return [(study_id, json.loads(record)) for study_id, record in reader.rows(query, key=STUDY)]


def find_study(home: Home, name: str) -> StudyResult | None:
    """The newest generation of a study without its trials; None where it has not begun. Raises StoreError."""
    with reading(home.storage_url) as reader:
        if reader is None or "trials" not in reader.tables():
            return None
        found = [to_result(record, ()) for _, record in _records(reader) if record["name"] == name]
    return max(found, key=lambda study: study.generation, default=None)


def count_trials(home: Home) -> str:
    """What is in the storage, in words; "" where there are no tables yet. Raises StoreError."""
    with reading(home.storage_url) as reader:
        if reader is None or "trials" not in reader.tables():
            return ""
        ((studies,),) = reader.rows("SELECT count(*) FROM study_user_attributes WHERE key = :key", key=STUDY)
        ((trials,),) = reader.rows("SELECT count(*) FROM trials")
    return f"{studies} {'study' if studies == 1 else 'studies'}, {trials} {'trial' if trials == 1 else 'trials'}"


def read_study(home: Home, name: str) -> StudyResult:
    """A study with all that its trials recorded, by a name as list_trials takes it. Raises StoreError."""
    return list_trials(home, name, whole=True)


def list_trials(home: Home, name: str, *, whole: bool = False) -> StudyResult:
    """A study, its newest generation or that of a title (name~1 is the first), with short results or whole ones.

    Short ones lack the epochs and the predicted classes. Raises StoreError where there is no such study.
    """
    with reading(home.storage_url) as reader:
        studies: dict[str, tuple[int, Any]] = {}
        if reader is not None and "trials" in reader.tables():
            studies = {to_result(record, ()).title: (study_id, record) for study_id, record in _records(reader)}
        titles = [title for title, (_, record) in studies.items() if record["name"] == name]
        title = max(titles, key=lambda title: studies[title][1]["generation"], default=name.removesuffix("~1"))
        if reader is None or title not in studies:
            raise no_study(name, sqlite_file(home.storage_url) or shown_address(home.storage_url), studies)
        study_id, record = studies[title]
        rows = trial_rows(reader, study_id)  # first: a result is written before the state that tells of it
        results = _attributes(reader, study_id, RESULT, without=() if whole else ("epochs", "predicted"))
        starts, pauses = (_attributes(reader, study_id, key) for key in (START, PAUSE))
        trials = [read_trial(row, *(found.get(row[0]) for found in (starts, results, pauses))) for row in rows]
        return to_result(record, trials)


def no_study(name: str, storage: object, titles: Iterable[str]) -> StoreError:
    """The error where a storage has no study of that name; titles are those that it has."""
    titles = list(titles)
    close = difflib.get_close_matches(name, titles, n=1)
    first = f"Did you mean {close[0]}? Else run it first" if close else "Run it first"
    return StoreError(
        f"{storage}: no study {name!r} has run here (known: {', '.join(titles) or 'none'}).",
        f"{first}: hpo run {name.partition('~')[0]}, or name its folder: --home DIR.",
    )


def trial_rows(reader: Reader, study: int) -> Sequence[Any]:
    """(Optuna's trial id, number, state, start, end) of every trial, by number."""
    return reader.rows(
        "SELECT trial_id, number, state, datetime_start, datetime_complete FROM trials WHERE study_id = :study "
        "ORDER BY number",
        study=study,
    )


def to_result(record: Mapping[str, Any], trials: Iterable[Trial]) -> StudyResult:
    """A study as the other rooms know it, from its stored record and its trials."""
    return StudyResult(
        name=record["name"],
        generation=record["generation"],
        direction=record["direction"],
        objective=record["objective"],
        trials=tuple(_grown(record, trials)),
        spec=record["spec"],
        data_digest=record["data_digest"],
        created=record["created"],
        objectives=tuple(map(tuple, record.get("objectives", [(record["objective"], record["direction"])]))),
        fitted=record.get("fitted", {}),
        enough=record.get("enough", {}).get("text", ""),
    )


def _grown(record: Mapping[str, Any], trials: Iterable[Trial]) -> Iterator[Trial]:
    """The trials of a study whose space may have changed, see hpo.search.growth."""
    grown, outside = record.get("grown", ()), frozenset(record.get("outside", ()))
    for trial in trials:
        candidate = trial.candidate
        held = held_of(grown, trial.number) if candidate.stage is None else {}
        if held.keys() - candidate.parameters.keys():
            candidate = replace(candidate, parameters={**held, **candidate.parameters})
        changed = candidate is not trial.candidate or trial.number in outside
        yield replace(trial, candidate=candidate, outside=trial.number in outside) if changed else trial


def _snapshot(home: Home, reader: Reader, study_id: int, record: Mapping[str, Any], *, results: bool) -> StudySnapshot:
    rows = trial_rows(reader, study_id)
    starts, pauses = (_attributes(reader, study_id, key) for key in (START, PAUSE))
    outcomes = _attributes(reader, study_id, RESULT, every=results)
    trials = [read_trial(row, *(found.get(row[0]) for found in (starts, outcomes, pauses))) for row in rows]
    study = to_result(record, trials)
    leases = {
        row[1]: starts[row[0]].get("lease", "")
        for row, trial in zip(rows, trials, strict=True)
        if trial.state is TrialState.RUNNING and row[0] in starts
    }
    near = [holder for holder in holders(home.locks) if holder.title == study.title]
    alive = {name: _is_held(home, name, near) for name in set(leases.values()) if is_near(home.locks, name)}
    silent = _silent(reader, study_id) if alive.keys() < set(leases.values()) else set()
    alive |= {name: number not in silent for number, name in leases.items() if not is_near(home.locks, name)}
    elsewhere = {name for name, living in alive.items() if living} - {ASKED, *(holder.lease for holder in near)}
    remote = [Holder(name, study.title, host_of(name)) for name in sorted(elsewhere)]
    return StudySnapshot(
        study=study,
        holders=(*near, *remote),
        leases=leases,
        abandoned=tuple(number for number, name in leases.items() if not alive[name]),
        best=study.best if results else _best(reader, study_id, study, {row[1]: row[0] for row in rows}),
    )


def _attributes(
    reader: Reader, study_id: int, key: str, *, every: bool = True, without: Sequence[str] = ()
) -> dict[int, Any]:
    """Optuna's trial id -> our record, of every trial or of failed ones only; without these keys of the record."""
    # For thousands of trials, most of the time would go into reading epochs only to drop them.
    value = reader.json_without("a.value_json", without)
    query = (
        f"SELECT a.trial_id, {value} FROM trial_user_attributes a JOIN trials t ON t.trial_id = a.trial_id "  # noqa: S608
        "WHERE t.study_id = :study AND a.key = :key AND (t.state = 'FAIL' OR :every = 1)"
    )
    rows = reader.rows(query, study=study_id, key=key, every=int(every))
    records = ((trial_id, json.loads(record)) for trial_id, record in rows)
    return {trial_id: _less(record, without) for trial_id, record in records}


def _less(record: Any, without: Sequence[str]) -> Any:
    return {part: value for part, value in record.items() if part not in without} if without and record else record


def read_trial(
    row: Sequence[Any], start: Mapping[str, Any] | None, outcome: Mapping[str, Any] | None, pauses: int | None
) -> Trial:
    """A trial as the other rooms know it, from a row of trial_rows, its two stored records, and its PAUSE."""
    _, number, state, begun, ended = row
    attrs = TrialAttrs(**{"ordinal": number, **(start or {})})
    result = TrialResult.from_json(outcome) if outcome is not None else None
    return make_trial(attrs, number, read_state(state, outcome, pauses), result, _time(begun), _time(ended))


def _time(value: Any) -> datetime | None:
    """A time that Optuna has stored, in local time; SQLite has it as text."""
    return datetime.fromisoformat(value) if isinstance(value, str) else value


def _is_held(home: Home, name: str, holders: Iterable[Holder]) -> bool:
    """Whether a lease with its lock here is held."""
    file = name.rpartition("|")[2]
    return (
        name == ASKED
        or any(holder.lease == name for holder in holders)
        or (bool(file) and seen_held(home.locks / file))
    )


def _silent(reader: Reader, study_id: int) -> set[int]:
    """The numbers of running trials without a recent heartbeat, by the server's clock."""
    rows = reader.rows(HEARTBEATS, study=study_id, grace=GRACE_SECONDS)
    return {number for _, number, _, late in rows if late}


def _best(reader: Reader, study_id: int, study: StudyResult, ids: Mapping[int, int]) -> Trial | None:
    """The best trial by Optuna's values; only its result is read, and those of infeasible ones before it."""
    query = (
        "SELECT t.number, v.value FROM trial_values v JOIN trials t ON t.trial_id = v.trial_id "
        "WHERE t.study_id = :study AND v.objective = 0 AND t.state = 'COMPLETE'"
    )
    values = {number: value for number, value in reader.rows(query, study=study_id) if value is not None}
    sign = -1.0 if study.direction == "maximize" else 1.0
    trials = {trial.number: trial for trial in study.trials}
    for number in sorted(values, key=lambda number: (sign * values[number], number)):
        if number not in trials or trials[number].candidate.stage in AFTER_SEARCH:
            continue
        record = reader.rows(
            "SELECT value_json FROM trial_user_attributes WHERE trial_id = :trial AND key = :key",
            trial=ids[number],
            key=RESULT,
        )
        result = TrialResult.from_json(json.loads(record[0][0])) if record else None
        if result is not None and result.feasible:
            return replace(trials[number], result=result)
    return None


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
        query = (
            "SELECT key, value_json FROM trial_user_attributes WHERE trial_id = :trial "
            "AND key IN (:start, :result, :pause)"
        )
        found = reader.rows(query, trial=key, start=START, result=RESULT, pause=PAUSE)
        records = {name: json.loads(text) for name, text in found}
        start = records.get(START) or {}
        trial = read_trial(row, start, records.get(RESULT), records.get(PAUSE))
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
        if trial.candidate.stage in AFTER_SEARCH:
            return TrialEnded(result)
        if trial.state.finished:
            self._finished.add(trial.candidate.ordinal)
        value = result.value if trial.state is TrialState.COMPLETE and result.feasible else None
        best = value is not None and (self._best is None or self._sign * value < self._sign * self._best)
        self._best = value if best else self._best
        return TrialEnded(replace(result, number=trial.number), best=best)


def _has_ended(trial: Trial) -> bool:
    return trial.state not in (TrialState.WAITING, TrialState.RUNNING, TrialState.PAUSED)
