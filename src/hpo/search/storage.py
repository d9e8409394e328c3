"""The study storage: open it safely, and read from it what a study has done."""

from __future__ import annotations

import copy
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages._cached_storage import _CachedStorage
from optuna.trial import FrozenTrial
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from hpo.errors import StoreError
from hpo.home import Home
from hpo.records import Candidate, StudyResult, Trial, TrialResult, TrialState
from hpo.search.lease import locked
from hpo.search.look import RESULT as RESULT
from hpo.search.look import START as START
from hpo.search.look import STUDY as STUDY

_BUSY_SECONDS = 60.0

_STATES = {
    optuna.trial.TrialState.WAITING: TrialState.WAITING,
    optuna.trial.TrialState.RUNNING: TrialState.RUNNING,
    optuna.trial.TrialState.COMPLETE: TrialState.COMPLETE,
    optuna.trial.TrialState.PRUNED: TrialState.PRUNED,
    optuna.trial.TrialState.FAIL: TrialState.FAILED,
}


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


class Storage(_CachedStorage):  # type: ignore[misc]
    """Optuna's cached storage, in which samplers and pruners see one stage only, and no interrupted trials.

    The retries of interrupted trials count in their place. stage is the one that is seen; None: trials without one.
    """

    stage: str | None = None

    def get_all_trials(self, study_id: int, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
        """The trials of the stage that are not stopped."""
        seen = [trial for trial in super().get_all_trials(study_id, deepcopy=False, states=states) if self._sees(trial)]
        return copy.deepcopy(seen) if deepcopy else seen

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        """The best complete trial of the stage; ValueError where there is none."""
        return optuna.storages.BaseStorage.get_best_trial(self, study_id)

    def _sees(self, trial: FrozenTrial) -> bool:
        return stage_of(trial) == self.stage and not _stopped(trial)

    def every_trial(self, study_id: int) -> list[FrozenTrial]:
        """All trials by number, stopped ones too; not to be changed."""
        return list(super().get_all_trials(study_id, deepcopy=False))

    def studies(self) -> dict[str, tuple[int, dict[str, Any]]]:
        """Title -> (Optuna's study id, our record), of the studies that are ours."""
        found = {study.study_name: (study._study_id, study.user_attrs.get(STUDY)) for study in self.get_all_studies()}
        return {title: (number, record) for title, (number, record) in found.items() if record}

    def close(self) -> None:
        """Close the connections."""
        self._backend.scoped_session.remove()
        self._backend.engine.dispose()


class _Connection(sqlite3.Connection):
    """Waits for the disk at checkpoints only: a power cut may undo the last seconds, a kill nothing."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.execute("PRAGMA synchronous=NORMAL")


def is_sqlite(home: Home) -> bool:
    """Whether the storage is a file beside the locks, and not a server."""
    return home.storage_url.startswith("sqlite")


def shown_url(home: Home) -> str:
    """The storage as a message may name it: a path, or an address without its password."""
    try:
        url = make_url(home.storage_url)
    except SQLAlchemyError:
        return "HPO_STORAGE"
    return url.database or "memory" if is_sqlite(home) else url.render_as_string(hide_password=True)


def open_storage(home: Home) -> Storage:
    """The study storage, made if need be, by one process at a time. Raises StoreError."""
    if home.storage_url == home.tracking_uri:
        raise StoreError(
            f"{shown_url(home)}: HPO_STORAGE and MLFLOW_TRACKING_URI name one database.",
            "Give each its own: Optuna and MLflow cannot share one.",
        )
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    home.create()
    options = {"connect_args": {"timeout": _BUSY_SECONDS, "factory": _Connection}} if is_sqlite(home) else {}
    with store_errors(home), locked(home.locks / "storage.lock"):
        if is_sqlite(home):
            _write_ahead(shown_url(home))
        # Optuna fills {} templates in an address; a folder may have braces in its name.
        url = home.storage_url.replace("{", "{{").replace("}", "}}")
        return Storage(optuna.storages.RDBStorage(url, engine_kwargs=options))


def _write_ahead(path: str) -> None:
    """Readers and one writer at a time do not wait for each other; the file remembers it."""
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
    finally:
        connection.close()


# What databases say -> what to do.
_HINTS = {
    "locked": "Another program keeps the database busy: end it, then run the study again to go on.",
    "readonly": "Make the file and its folder writable, or choose another folder: --home DIR.",
    "read-only": "Make the file and its folder writable, or choose another folder: --home DIR.",
    "unable to open": "Check the folder and its permissions, or choose another: --home DIR.",
    "not a database": "The file is something else: move it away, or choose another folder: --home DIR.",
    "malformed": "The file is damaged: restore it from a copy, or move it away.",
    "full": "Free some space on the disk, then run the study again to go on.",
    "no longer compatible": "It was written by another version of Optuna: optuna storage upgrade --storage URL.",
    "no module named": "Install the driver of this database, or unset HPO_STORAGE.",
}


@contextmanager
def store_errors(home: Home) -> Iterator[None]:
    """What Optuna, SQLAlchemy and SQLite raise in the block becomes one StoreError with place and next step."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, optuna.exceptions.OptunaError, RuntimeError, ImportError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = str(getattr(cause, "orig", None) or cause).splitlines()[0].rstrip(".")
        hint = next((hint for words, hint in _HINTS.items() if words in text.lower()), "")
        raise StoreError(
            f"{shown_url(home)}: the study storage refuses: {text}.", hint or "Check the database, then run again."
        ) from error


def generations(storage: Storage, name: str) -> dict[int, str]:
    """Generation -> title of every study of that name."""
    match = re.compile(rf"{re.escape(name)}(?:~(\d+))?").fullmatch
    titles = {found.string: found for found in map(match, storage.studies()) if found}
    return {int(found[1] or 1): title for title, found in titles.items()}


def to_result(record: Mapping[str, Any], trials: list[FrozenTrial]) -> StudyResult:
    """The study's own record and its trials, as the rest of the house knows them."""
    return StudyResult(
        name=record["name"],
        generation=record["generation"],
        direction=record["direction"],
        objective=record["objective"],
        trials=tuple(map(to_trial, trials)),
        spec=record["spec"],
        data_digest=record["data_digest"],
        created=record["created"],
        objectives=tuple(map(tuple, record.get("objectives", [(record["objective"], record["direction"])]))),
    )


def to_trial(trial: FrozenTrial) -> Trial:
    """Optuna's trial as the rest of the house knows it."""
    start = start_of(trial)
    begun, ended = trial.datetime_start, trial.datetime_complete
    return Trial(
        candidate=to_candidate(trial.number, start),
        state=state_of(trial),
        result=result_of(trial),
        started=begun.timestamp() if begun else 0.0,
        run_seconds=(ended - begun).total_seconds() if begun and ended else 0.0,
        worker=start.worker,
    )


def to_candidate(number: int, start: Start) -> Candidate:
    """The candidate of a start record."""
    return Candidate(number, start.ordinal, start.parameters or {}, start.seed, start.attempt, start.stage)


def read_study(home: Home, name: str) -> StudyResult:
    """What the storage holds of a study: its newest generation, or the one of an exact title such as name~2.

    Changes nothing in it. Raises StoreError where there is no such study.
    """
    with _reading(home) as storage:
        studies = storage.studies() if storage else {}
        known = generations(storage, name) if storage else {}
        title = known[max(known)] if known else name
        if storage is None or title not in studies:
            raise StoreError(
                f"{shown_url(home)}: no study {name!r} has run here (known: {', '.join(studies) or 'none'}).",
                f"Run it first: hpo run {name.partition('~')[0]}, or name its folder: --home DIR.",
            )
        number, record = studies[title]
        return to_result(record, storage.every_trial(number))


def list_studies(home: Home) -> list[StudyResult]:
    """Every generation of every study in the storage, oldest first; none where there is no storage yet."""
    with _reading(home) as storage:
        found = storage.studies().values() if storage else ()
        results = [to_result(record, storage.every_trial(number)) for number, record in found if storage]
    return sorted(results, key=lambda result: result.created)


@contextmanager
def _reading(home: Home) -> Iterator[Storage | None]:
    if is_sqlite(home) and not Path(shown_url(home)).exists():
        yield None
        return
    storage = open_storage(home)
    try:
        with store_errors(home):
            yield storage
    finally:
        storage.close()
