"""The study storage: open it safely, and read from it what a study has done."""

from __future__ import annotations

import copy
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.storages._cached_storage import _CachedStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from hpo.errors import StoreError
from hpo.home import Home
from hpo.records import Candidate, StudyResult, Trial
from hpo.search.books import Books
from hpo.search.lease import locked
from hpo.search.look import RESULT as RESULT
from hpo.search.look import START as START
from hpo.search.look import STUDY as STUDY
from hpo.search.look import no_study
from hpo.search.look import to_result as to_result
from hpo.search.patience import Patient
from hpo.search.start import Start as Start
from hpo.search.start import result_of as result_of
from hpo.search.start import stage_of as stage_of
from hpo.search.start import start_of as start_of
from hpo.search.start import state_of as state_of

_BUSY_SECONDS = 60.0


class Storage(_CachedStorage):  # type: ignore[misc]
    """Optuna's cached storage, in which samplers and pruners see one stage only, and no interrupted trials.

    The retries of interrupted trials count in their place. show says which stage is seen; at first it is the trials
    without one.
    """

    def __init__(self, backend: Any) -> None:
        super().__init__(backend)
        self._stage: str | None = None
        self._brief = False
        self._books: dict[int, Books] = {}
        self._unread: dict[int, list[FrozenTrial]] = {}
        self._records: dict[int, Trial] = {}  # by Optuna's id; of trials that have ended

    def show(self, stage: str | None, *, brief: bool = False) -> None:
        """Have a stage seen from now on; brief: only a part of it where it is long, see books."""
        self._stage, self._brief = stage, brief

    def get_all_trials(self, study_id: int, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
        """The trials of the stage that are not stopped."""
        books = self.books(study_id)
        shelf = books.shelf(self._stage)
        seen = [*(shelf.shown() if self._brief else shelf.ended), *books.under_way(self._stage)]
        if states is not None:
            seen = [trial for trial in seen if trial.state in states]
        seen.sort(key=lambda trial: trial.number)
        return copy.deepcopy(seen) if deepcopy else seen

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        """The best complete trial of the stage; ValueError where there is none."""
        return optuna.storages.BaseStorage.get_best_trial(self, study_id)

    def every_trial(self, study_id: int) -> list[FrozenTrial]:
        """All trials by number, stopped ones too; not to be changed."""
        return list(super().get_all_trials(study_id, deepcopy=False))

    def books(self, study_id: int) -> Books:
        """All trials as they stand now, sorted; not to be changed."""
        self._read_trials_from_remote_storage(study_id)
        if study_id not in self._books:
            directions = self.get_study_directions(study_id)
            self._books[study_id] = Books([way is StudyDirection.MAXIMIZE for way in directions])
        self._books[study_id].read(self._unread.pop(study_id, ()))
        return self._books[study_id]

    def records(self, study_id: int) -> list[Trial]:
        """All trials by number as the rest of the house knows them; those that have ended are read once."""
        for trial in (trials := self.every_trial(study_id)):
            if trial.state.is_finished() and trial._trial_id not in self._records:
                self._records[trial._trial_id] = to_trial(trial)
        return [self._records.get(trial._trial_id) or to_trial(trial) for trial in trials]

    def _add_trials_to_cache(self, study_id: int, trials: list[FrozenTrial]) -> None:
        super()._add_trials_to_cache(study_id, trials)
        self._unread.setdefault(study_id, []).extend(trials)

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
        return Storage(Patient(optuna.storages.RDBStorage(url, engine_kwargs=options)))


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
    return Candidate(
        number, start.ordinal, start.parameters or {}, start.seed, start.attempt, start.stage, start.deaths
    )


def read_study(home: Home, name: str) -> StudyResult:
    """What the storage holds of a study: its newest generation, or that of a title such as name~2; name~1: the first.

    Changes nothing in it. Raises StoreError where there is no such study.
    """
    with _reading(home) as storage:
        studies = storage.studies() if storage else {}
        known = generations(storage, name) if storage else {}
        title = known[max(known)] if known else name.removesuffix("~1")
        if storage is None or title not in studies:
            raise no_study(name, shown_url(home), studies)
        number, record = studies[title]
        return to_result(record, storage.records(number))


def list_studies(home: Home) -> list[StudyResult]:
    """Every generation of every study in the storage, oldest first; none where there is no storage yet."""
    with _reading(home) as storage:
        found = storage.studies().values() if storage else ()
        results = [to_result(record, storage.records(number)) for number, record in found if storage]
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
