"""Look at the study storage beside those who write it: no lock, no file made, and Optuna is not loaded."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from hpo.database import Reader, engine_name, reading, sqlite_file
from hpo.errors import StoreError
from hpo.home import Home
from hpo.records import FINAL, Candidate, StudyResult, Trial, TrialResult, TrialState
from hpo.storage.lease import Holder, holders, host_of, is_near, seen_held

# The attributes of ours in Optuna's storage: two a trial, three a study (the second: when a stop was last asked for;
# the third: of how many trials somebody has claimed to sum them up).
STUDY, STOP, CLAIM = "hpo.study", "hpo.stop", "hpo.claim"
START, RESULT = "hpo.start", "hpo.result"

_STATES = {
    "WAITING": TrialState.WAITING,
    "RUNNING": TrialState.RUNNING,
    "COMPLETE": TrialState.COMPLETE,
    "PRUNED": TrialState.PRUNED,
    "FAIL": TrialState.FAILED,
}


@dataclass(frozen=True)
class Look:
    """A study at a moment.

    holders are its living supervisors. leases maps each running trial to the name of its supervisor's lease; abandoned
    are the running trials whose supervisor is dead. best is the best complete trial of the search, with its result.
    """

    study: StudyResult
    holders: tuple[Holder, ...]
    leases: Mapping[int, str]
    abandoned: tuple[int, ...]
    best: Trial | None = None

    @property
    def running(self) -> list[Trial]:
        """The trials that a living supervisor answers for."""
        return [t for t in self.study.trials if t.state is TrialState.RUNNING and t.number not in self.abandoned]


def look(home: Home, *, results: bool = True) -> list[Look]:
    """Every generation of every study, oldest first; none where there is no storage. Raises StoreError.

    Without results the records of what came out (every epoch of every trial) are left where they are, but for the
    best trial of each study and for those that failed: a look at 10,000 trials then takes a moment.
    """
    with reading(home.storage_url) as reader:
        if reader is None or "trials" not in reader.tables():
            return []
        found = [
            _look(home, reader, number, json.loads(record), results=results)
            for number, record in reader.rows(
                "SELECT study_id, value_json FROM study_user_attributes WHERE key = :key", key=STUDY
            )
        ]
    return sorted(found, key=lambda one: one.study.created)


def count_trials(home: Home) -> str:
    """What is in the storage, in words; "" where there are no tables yet. Raises StoreError."""
    with reading(home.storage_url) as reader:
        if reader is None or "trials" not in reader.tables():
            return ""
        ((studies,),) = reader.rows("SELECT count(*) FROM study_user_attributes WHERE key = :key", key=STUDY)
        ((trials,),) = reader.rows("SELECT count(*) FROM trials")
    return f"{studies} {'study' if studies == 1 else 'studies'}, {trials} {'trial' if trials == 1 else 'trials'}"


def list_trials(home: Home, name: str) -> StudyResult:
    """A study, its newest generation or that of a title (name~1: the first), with results that lack their bulk.

    That is their epochs and the predicted classes. Raises StoreError where there is no such study.
    """
    with reading(home.storage_url) as reader:
        found: dict[str, tuple[int, Any]] = {}
        if reader is not None and "trials" in reader.tables():
            query = "SELECT study_id, value_json FROM study_user_attributes WHERE key = :key"
            records = [(number, json.loads(text)) for number, text in reader.rows(query, key=STUDY)]
            found = {to_result(record, ()).title: (number, record) for number, record in records}
        generations = [title for title, (_, record) in found.items() if record["name"] == name]
        title = max(generations, key=lambda one: found[one][1]["generation"], default=name.removesuffix("~1"))
        if reader is None or title not in found:
            raise no_study(name, sqlite_file(home.storage_url) or engine_name(home.storage_url), found)
        number, record = found[title]
        outcomes = _attributes(reader, number, RESULT, without=("epochs", "predicted"))
        known = _attributes(reader, number, START)
        return to_result(
            record, [read_trial(row, known.get(row[0]), outcomes.get(row[0])) for row in trial_rows(reader, number)]
        )


def no_study(name: str, place: object, known: Iterable[str]) -> StoreError:
    """What to say where a storage has no study of that name; known are those that it has."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    first = f"Did you mean {close[0]}? Else run it first" if close else "Run it first"
    return StoreError(
        f"{place}: no study {name!r} has run here (known: {', '.join(known) or 'none'}).",
        f"{first}: hpo run {name.partition('~')[0]}, or name its folder: --home DIR.",
    )


def trial_rows(reader: Reader, study: int) -> Sequence[Any]:
    """(Optuna's trial id, number, state, begun, ended) of every trial, by number."""
    return reader.rows(
        "SELECT trial_id, number, state, datetime_start, datetime_complete FROM trials WHERE study_id = :study "
        "ORDER BY number",
        study=study,
    )


def to_result(record: Mapping[str, Any], trials: Iterable[Trial]) -> StudyResult:
    """The study's own record and its trials, as the rest of the house knows it."""
    return StudyResult(
        name=record["name"],
        generation=record["generation"],
        direction=record["direction"],
        objective=record["objective"],
        trials=tuple(trials),
        spec=record["spec"],
        data_digest=record["data_digest"],
        created=record["created"],
        objectives=tuple(map(tuple, record.get("objectives", [(record["objective"], record["direction"])]))),
    )


def _look(home: Home, reader: Reader, study: int, record: Mapping[str, Any], *, results: bool) -> Look:
    rows = trial_rows(reader, study)
    known = _attributes(reader, study, START)
    outcomes = _attributes(reader, study, RESULT, every=results)
    trials = [read_trial(row, known.get(row[0]), outcomes.get(row[0])) for row in rows]
    whole = to_result(record, trials)
    leases = {
        row[1]: known[row[0]].get("lease", "")
        for row, trial in zip(rows, trials, strict=True)
        if trial.state is TrialState.RUNNING and row[0] in known
    }
    mine = [holder for holder in holders(home.locks) if holder.title == whole.title]
    alive = {name: _alive(home, name, mine) for name in set(leases.values()) if is_near(home.locks, name)}
    silent = _silent(reader, study) if alive.keys() < set(leases.values()) else set()
    alive |= {name: number not in silent for number, name in leases.items() if not is_near(home.locks, name)}
    elsewhere = {name for name, living in alive.items() if living} - {holder.lease for holder in mine}
    others = [Holder(name, whole.title, host_of(name)) for name in sorted(elsewhere)]
    return Look(
        study=whole,
        holders=(*mine, *others),
        leases=leases,
        abandoned=tuple(number for number, name in leases.items() if not alive[name]),
        best=whole.best if results else _best(reader, study, whole, {row[1]: row[0] for row in rows}),
    )


def _attributes(
    reader: Reader, study: int, key: str, *, every: bool = True, without: Sequence[str] = ()
) -> dict[int, Any]:
    """Optuna's trial id -> our record, of every trial or of those that failed there; without some of its parts."""
    # Reading epochs only to drop them is most of the work for thousands of trials.
    value = reader.json_without("a.value_json", without)
    query = (
        f"SELECT a.trial_id, {value} FROM trial_user_attributes a JOIN trials t ON t.trial_id = a.trial_id "  # noqa: S608
        "WHERE t.study_id = :study AND a.key = :key AND (t.state = 'FAIL' OR :every = 1)"
    )
    rows = reader.rows(query, study=study, key=key, every=int(every))
    records = ((number, json.loads(text)) for number, text in rows)
    return {number: {part: it for part, it in record.items() if part not in without} for number, record in records}


def read_trial(row: Sequence[Any], start: Mapping[str, Any] | None, outcome: Mapping[str, Any] | None) -> Trial:
    """A row of trial_rows and the trial's records, as the rest of the house knows it."""
    _, number, state, begun, ended = row
    start = start or {}
    stopped = outcome is not None and state == "FAIL" and outcome.get("state") == TrialState.STOPPED
    begun, ended = _time(begun), _time(ended)
    return Trial(
        candidate=Candidate(
            number,
            start.get("ordinal", number),
            start.get("parameters") or {},
            start.get("seed", 0),
            start.get("attempt", 1),
            start.get("stage"),
            start.get("deaths", 0),
        ),
        state=TrialState.STOPPED if stopped else _STATES[state],
        result=TrialResult.from_json(outcome) if outcome is not None else None,
        started=begun.timestamp() if begun else 0.0,
        run_seconds=(ended - begun).total_seconds() if begun and ended else 0.0,
        worker=start.get("worker", ""),
    )


def _time(value: Any) -> datetime | None:
    """A time of Optuna's, in local time as it writes it; SQLite has it as text."""
    return datetime.fromisoformat(value) if isinstance(value, str) else value


def _alive(home: Home, name: str, known: Iterable[Holder]) -> bool:
    """Whether a lease with its lock here is held."""
    file = name.rpartition("|")[2]
    return any(holder.lease == name for holder in known) or (bool(file) and seen_held(home.locks / file))


def _silent(reader: Reader, study: int) -> set[int]:
    """Numbers of running trials that have given no sign of life for a minute, by the server's clock."""
    query = (
        "SELECT t.number FROM trials t JOIN trial_heartbeats h ON h.trial_id = t.trial_id WHERE t.study_id = :study "
        "AND t.state = 'RUNNING' AND h.heartbeat < timezone('utc', now()) - interval '60 seconds'"
    )
    return {row[0] for row in reader.rows(query, study=study)}


def _best(reader: Reader, study: int, whole: StudyResult, ids: Mapping[int, int]) -> Trial | None:
    """The best trial, by Optuna's values: only its own record is read, and those of infeasible ones before it."""
    query = (
        "SELECT t.number, v.value FROM trial_values v JOIN trials t ON t.trial_id = v.trial_id "
        "WHERE t.study_id = :study AND v.objective = 0 AND t.state = 'COMPLETE'"
    )
    values = {number: value for number, value in reader.rows(query, study=study) if value is not None}
    sign = -1.0 if whole.direction == "maximize" else 1.0
    trials = {trial.number: trial for trial in whole.trials}
    for number in sorted(values, key=lambda number: (sign * values[number], number)):
        if number not in trials or trials[number].candidate.stage == FINAL:
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
