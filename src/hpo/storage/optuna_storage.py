"""The study storage: open it safely, and read from it what a study has done."""

from __future__ import annotations

import copy
import math
import re
import sqlite3
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages._cached_storage import _CachedStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from hpo.database import SERVER_ARGUMENTS, reading
from hpo.errors import StoreError
from hpo.home import Home
from hpo.locks import hold, lock
from hpo.records import Candidate, StudyResult, Trial
from hpo.storage.errors import shown_url, store_errors
from hpo.storage.reader import RESULT as RESULT
from hpo.storage.reader import START as START
from hpo.storage.reader import STUDY as STUDY
from hpo.storage.reader import no_study
from hpo.storage.reader import to_result as to_result
from hpo.storage.retry import Patient
from hpo.storage.trial_attrs import Start as Start
from hpo.storage.trial_attrs import result_of as result_of
from hpo.storage.trial_attrs import stage_of as stage_of
from hpo.storage.trial_attrs import start_of as start_of
from hpo.storage.trial_attrs import state_of as state_of
from hpo.storage.trial_index import Books

T = TypeVar("T")

_BUSY_SECONDS = 60.0
BEAT, GRACE = 15, 60  # seconds between signs of life of a supervisor on a server; without one for so long it is dead


class Storage(_CachedStorage):  # type: ignore[misc]
    """Optuna's cached storage, in which samplers and pruners see one stage only, and no interrupted trials.

    The retries of interrupted trials count in their place. show says which stage is seen; at first it is the trials
    without one. shared: it is a server's, with supervisors on other machines. rollbacks counts the steps whose work the
    server has undone: what others have made of what they saw in one is then not so.
    """

    def __init__(self, home: Home, backend: Any) -> None:
        super().__init__(backend)
        self.shared = home.shared
        self.rollbacks = 0
        self._created: FrozenTrial | None = None
        self._asking = False
        self._home = home
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

    def _read_trials_from_remote_storage(self, study_id: int) -> None:
        """Read what has changed. While a candidate is asked for on a server: only what is new, or in another state.

        Hundreds of supervisors have hundreds of trials running, of which all else that is needed does not change; what
        they report meanwhile is for pruners, who ask when no candidate is asked for.
        """
        known = self._studies[study_id].trials if study_id in self._studies else {}
        if not self._asking or not known:
            super()._read_trials_from_remote_storage(study_id)
            return
        study, latest = self._studies[study_id], max(trial._trial_id for trial in known.values())
        open_trials = {trial._trial_id: trial for trial in known.values() if not trial.state.is_finished()}
        states = self._states(study_id, open_trials, latest)
        # One of our own has been read last before its parameters were drawn.
        changed = {
            number
            for number, trial in open_trials.items()
            if number in states and (states[number] != trial.state.name or start_of(trial).parameters is None)
        }
        if not changed and states.keys() <= open_trials.keys():
            return
        with self._lock:
            trials = self._backend._get_trials(study_id, None, changed, latest)
            self._add_trials_to_cache(study_id, trials)
            for trial in trials:
                if trial.state.is_finished():
                    study.unfinished_trial_ids.discard(trial._trial_id)
                    study.last_finished_trial_id = max(study.last_finished_trial_id, trial._trial_id)
                else:
                    study.unfinished_trial_ids.add(trial._trial_id)

    def _states(self, study_id: int, known: Collection[int], latest: int) -> dict[int, str]:
        """Optuna's id -> state, of these trials and of all later ones."""
        query = text(
            "SELECT trial_id, CAST(state AS VARCHAR) FROM trials WHERE study_id = :study "
            "AND (trial_id > :latest OR trial_id = ANY(:known))"
        )
        session = self._backend.scoped_session()
        rows = session.execute(query, {"study": study_id, "latest": latest, "known": list(known)})
        return {row[0]: row[1] for row in rows}

    def _add_trials_to_cache(self, study_id: int, trials: list[FrozenTrial]) -> None:
        super()._add_trials_to_cache(study_id, trials)
        self._unread.setdefault(study_id, []).extend(trials)

    def studies(self) -> dict[str, tuple[int, dict[str, Any]]]:
        """Title -> (Optuna's study id, our record), of the studies that are ours."""
        found = {study.study_name: (study._study_id, study.user_attrs.get(STUDY)) for study in self.get_all_studies()}
        return {title: (number, record) for title, (number, record) in found.items() if record}

    def locked(self, name: str) -> AbstractContextManager[None]:
        """Hold the lock of this name among all that use the storage."""
        return lock(self._home, name)

    def at_once(self, step: Callable[[], T], *, lock: str = "") -> T:
        """step(), with this lock held; on a server all of it is one transaction."""
        if not self.shared:
            with self.locked(lock) if lock else nullcontext():
                return step()

        begun = False

        def whole(session: Any) -> T:
            nonlocal begun
            if begun:
                self._forget()
            begun = True
            if lock:
                hold(session, lock)
            return step()

        try:
            done: T = self._backend.at_once(whole)
        except BaseException:
            self._forget()
            raise
        return done

    def _forget(self) -> None:
        """Read everything anew: trials may be known here that were made, or ended, in a step that was rolled back."""
        self.rollbacks += 1
        with self._lock:
            for known in (self._studies, self._trial_id_to_study_id_and_number, self._study_id_and_number_to_trial_id):
                known.clear()
        for read in (self._books, self._unread, self._records):
            read.clear()
        self._created = None

    def ask_at_once(self, study_id: int, step: Callable[[], T], *, lock: str) -> T:
        """As at_once, for a step that asks for a candidate: only what it needs is read of trials that run elsewhere.

        On a server most of that is read before the lock is taken: a crowd waits for the lock.
        """
        self._asking = self.shared
        try:
            if self.shared:
                self.at_once(lambda: self.books(study_id))
            return self.at_once(step, lock=lock)
        finally:
            self._asking = False

    def begin_trial(self, study: optuna.Study, template: FrozenTrial) -> optuna.trial.Trial:
        """A new running trial with what the template has; its parameters are drawn as it is asked for them."""
        study._thread_local.cached_all_trials = None  # as Optuna's ask does
        self._created = None
        trial_id = self.create_new_trial(study._study_id, template)
        study_id, number = self._trial_id_to_study_id_and_number[trial_id]
        self._created = self._studies[study_id].trials[number]
        return optuna.trial.Trial(study, trial_id)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """The trial as it stands; one that was made just now is not read again."""
        created, self._created = self._created, None
        if created is not None and created._trial_id == trial_id:
            return copy.deepcopy(created)
        return super().get_trial(trial_id)

    def end_trial(self, trial: FrozenTrial, state: optuna.trial.TrialState, values: Any) -> None:
        """Optuna's tell, without reading the trial again before and after: no sampler of ours has anything to add.

        A pruned trial has the value of its last report, as there.
        """
        if state is optuna.trial.TrialState.PRUNED and trial.last_step is not None:
            last = trial.intermediate_values[trial.last_step]
            values = None if math.isnan(last) else [last]
        self.set_trial_state_values(trial._trial_id, state, values)

    def beat(self, trial_ids: Iterable[int]) -> None:
        """Give a sign of life for these trials (Optuna's ids), by the server's clock; with none, see if it answers."""
        self._backend.at_once(lambda session: session.execute(text("SELECT 1")))
        for trial_id in trial_ids:
            self._backend.record_heartbeat(trial_id)

    def silent(self, study_id: int) -> set[int]:
        """Optuna's ids of the running trials that have given no sign of life for GRACE seconds, by the server's clock.

        One that never gave any (its process died before) is given one here, so that its time runs, too.
        """
        running = "SELECT t.trial_id FROM trials t LEFT JOIN trial_heartbeats h ON h.trial_id = t.trial_id "
        query = text(running + "WHERE t.study_id = :study AND t.state = 'RUNNING' AND h.trial_id IS NULL")
        mute = self._backend.at_once(lambda session: session.execute(query, {"study": study_id}).scalars().all())
        for trial_id in mute:
            with suppress(IntegrityError, StorageInternalError):  # it has just begun to beat
                self._backend.record_heartbeat(trial_id)
        return set(self._backend._get_stale_trial_ids(study_id))

    def close(self) -> None:
        """Close the connections."""
        self._backend.scoped_session.remove()
        self._backend.engine.dispose()


class _Connection(sqlite3.Connection):
    """Waits for the disk at checkpoints only: a power cut may undo the last seconds, a kill nothing."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.execute("PRAGMA synchronous=NORMAL")


def open_storage(home: Home) -> Storage:
    """The study storage, made if need be, by one process at a time. Raises StoreError."""
    if home.storage_url == home.tracking_uri:
        raise StoreError(
            f"{shown_url(home)}: HPO_STORAGE and MLFLOW_TRACKING_URI name one database.",
            "Give each its own: Optuna and MLflow cannot share one.",
        )
    if home.shared and not home.storage_url.startswith("postgresql"):
        raise StoreError(
            f"{shown_url(home)}: studies are kept in PostgreSQL or SQLite.",
            "Give HPO_STORAGE an address such as postgresql://hpo@db.example.org/hpo, or unset it.",
        )
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # What Optuna has to say about its experimental parts is not for our users. Filtered once: catch_warnings around
    # every call is not safe while the tracker's thread uses it too.
    warnings.filterwarnings("ignore", module="optuna")
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    home.create()
    # Optuna fills {} templates in an address; a folder may have braces in its name.
    url = home.storage_url.replace("{", "{{").replace("}", "}}")
    # A crowd that opens what was made long ago need not queue for it.
    with store_errors(home), nullcontext() if home.shared and _is_made(home) else lock(home, "storage"):
        if not home.shared:
            _write_ahead(shown_url(home))
            options: dict[str, Any] = {"connect_args": {"timeout": _BUSY_SECONDS, "factory": _Connection}}
            return Storage(home, Patient(optuna.storages.RDBStorage(url, engine_kwargs=options)))
        options = {"connect_args": SERVER_ARGUMENTS, "pool_size": 1, "max_overflow": 8, "pool_pre_ping": True}
        backend = optuna.storages.RDBStorage(url, engine_kwargs=options, heartbeat_interval=BEAT, grace_period=GRACE)
        return Storage(home, Patient(backend))


def _is_made(home: Home) -> bool:
    with suppress(StoreError), reading(home.storage_url) as reader:  # what refuses says so when it is opened
        return reader is not None and bool(reader.schema())
    return False


def upgrade_storage(home: Home) -> None:
    """Bring the tables of an older Optuna up to date. Raises StoreError."""
    with store_errors(home), lock(home, "storage"):
        options = {"connect_args": SERVER_ARGUMENTS} if home.shared else {}
        storage = optuna.storages.RDBStorage(home.storage_url, engine_kwargs=options, skip_compatibility_check=True)
        storage.upgrade()
        storage.scoped_session.remove()
        storage.engine.dispose()


def _write_ahead(path: str) -> None:
    """Readers and one writer at a time do not wait for each other; the file remembers it."""
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
    finally:
        connection.close()


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
    if not home.shared and not Path(shown_url(home)).exists():
        yield None
        return
    storage = open_storage(home)
    try:
        with store_errors(home):
            yield storage
    finally:
        storage.close()
