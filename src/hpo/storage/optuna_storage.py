"""The study storage: Optuna's database, opened safely, read incrementally, changed in transactions."""

from __future__ import annotations

import json
import math
import re
import sqlite3
import warnings
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, TypeVar

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from hpo.database import SERVER_ARGUMENTS, reading
from hpo.errors import StoreError
from hpo.home import Home
from hpo.locks import hold, lock
from hpo.records import Trial
from hpo.storage import liveness
from hpo.storage.optuna_private import create_trial, read_trials, set_param, trial_id_of
from hpo.storage.retry import Retrying, shown_url, store_errors
from hpo.storage.trial_attrs import PAUSE, START, STUDY, attrs_of, pauses_of, to_trial
from hpo.storage.trial_index import TrialIndex

T = TypeVar("T")

_BUSY_SECONDS = 60.0


class Storage:
    """The study storage, with an index of the trials of each study that was read.

    database is Optuna's RDBStorage, whose methods are retried. shared: it is on a server, with supervisors on other
    machines. rollbacks counts the transactions that the server has undone: conclusions from what was read in one may be
    false. pauses: trials of the studies may be paused and continue.
    """

    def __init__(self, home: Home, database: Any) -> None:
        self.database = database
        self.shared = home.shared
        self.rollbacks = 0
        self.pauses = False
        self._home = home
        self._asking = False
        self._read: set[int] | None = None  # for the candidate that is asked for, from a file
        self._directions: dict[int, list[StudyDirection]] = {}
        self._indexes: dict[int, TrialIndex] = {}
        self._seen: dict[int, Callable[[FrozenTrial], FrozenTrial | None]] = {}
        self._ranges: dict[tuple[int, str], BaseDistribution] = {}  # one of each parameter, to compare with
        self._records: dict[int, Trial] = {}  # by Optuna's id; of trials that have ended

    def index(self, study_id: int) -> TrialIndex:
        """All trials of a study as they are now; not to be changed."""
        if study_id not in self._indexes:
            maximize = [way is StudyDirection.MAXIMIZE for way in self.directions(study_id)]
            self._indexes[study_id] = TrialIndex(maximize, self._seen.get(study_id, lambda trial: trial))
        index = self._indexes[study_id]
        if self._read is not None:
            if study_id in self._read:
                return index
            self._read.add(study_id)
        trials = self._changed(study_id, index)
        index.update(trials)
        settled = [trial_id_of(trial) for trial in trials if trial.state.is_finished() or pauses_of(trial)]
        index.read_up_to = max([index.read_up_to, *settled])
        return index

    def show(self, study_id: int, seen: Callable[[FrozenTrial], FrozenTrial | None]) -> None:
        """From now on the index has ended trials of a study as seen shows them; see TrialIndex."""
        self._seen[study_id] = seen
        self._indexes.pop(study_id, None)

    def every_trial(self, study_id: int) -> list[FrozenTrial]:
        """All trials by number, interrupted ones included; not to be changed."""
        trials = self.index(study_id).trials
        return [trials[number] for number in sorted(trials)]

    def records(self, study_id: int) -> list[Trial]:
        """All trials by number as the other rooms know them; those that have ended are parsed once."""
        for trial in (trials := self.every_trial(study_id)):
            if trial.state.is_finished() and trial_id_of(trial) not in self._records:
                self._records[trial_id_of(trial)] = to_trial(trial)
        return [self._records.get(trial_id_of(trial)) or to_trial(trial) for trial in trials]

    def _changed(self, study_id: int, index: TrialIndex) -> list[FrozenTrial]:
        """The trials that may have changed. While a candidate is asked for on a server: new ones, or of another state.

        Hundreds of supervisors have hundreds of trials running, of which a sampler needs nothing else. What they report
        meanwhile is for pruners, which are not called while a candidate is asked for; but it decides which paused trial
        is promoted.
        """
        unfinished = {trial_id_of(trial): trial for trial in index.open.values()}
        turned = self._turned(study_id, index, unfinished) if (self.pauses or index.paused) and index.trials else set()
        if not self._asking or self.pauses or not index.trials:
            return read_trials(self.database, study_id, ids=unfinished.keys() | turned, after=index.read_up_to)
        states = self._states(study_id, unfinished, index.latest)
        # A trial of our own was last read before its parameters were drawn.
        changed = {
            trial_id
            for trial_id, trial in unfinished.items()
            if trial_id in states and (states[trial_id] != trial.state.name or attrs_of(trial).parameters is None)
        }
        if not changed | turned and states.keys() <= unfinished.keys():
            return []
        return read_trials(self.database, study_id, ids=changed | turned, after=index.latest)

    def _turned(self, study_id: int, index: TrialIndex, unfinished: Collection[int]) -> set[int]:
        """Optuna's ids of the known trials that were paused, or went on or ended after a pause, since they were read.

        Most trials of a study may be paused: they are not read again as long as nothing happens to them.
        """
        query = text(
            "SELECT a.trial_id, a.value_json FROM trial_user_attributes a JOIN trials t ON t.trial_id = a.trial_id "
            "WHERE t.study_id = :study AND t.state = 'RUNNING' AND a.key = :key"
        )
        values = {"study": study_id, "key": PAUSE}
        rows = self.database.transact(lambda session: session.execute(query, values).all())
        now = {row[0]: int(json.loads(row[1])) for row in rows}
        known = {trial_id_of(trial): pauses_of(trial) for trial in index.paused.values()}
        turned = {trial_id for trial_id, count in known.items() if now.get(trial_id) != count}
        return turned | {trial_id for trial_id, count in now.items() if count and trial_id in unfinished}

    def _states(self, study_id: int, trial_ids: Collection[int], latest: int) -> dict[int, str]:
        """Optuna's id -> name of the state, of these trials and of all later ones."""
        query = text(
            "SELECT trial_id, CAST(state AS VARCHAR) FROM trials WHERE study_id = :study "
            "AND (trial_id > :latest OR trial_id = ANY(:known))"
        )
        values = {"study": study_id, "latest": latest, "known": list(trial_ids)}
        rows = self.database.transact(lambda session: session.execute(query, values).all())
        return {row[0]: row[1] for row in rows}

    def directions(self, study_id: int) -> list[StudyDirection]:
        """The direction of each objective of a study."""
        if study_id not in self._directions:
            self._directions[study_id] = self.database.get_study_directions(study_id)
        return self._directions[study_id]

    def study_ids(self) -> dict[str, int]:
        """Title -> Optuna's id, of every study; other programs' and unfinished ones included."""
        query = text("SELECT study_name, study_id FROM studies ORDER BY study_id")
        return {row[0]: row[1] for row in self.database.transact(lambda session: session.execute(query).all())}

    def studies(self) -> dict[str, tuple[int, dict[str, Any]]]:
        """Title -> (Optuna's id, our record), of the studies of hpo."""
        query = text(
            "SELECT s.study_name, s.study_id, a.value_json FROM studies s JOIN study_user_attributes a "
            "ON a.study_id = s.study_id WHERE a.key = :key ORDER BY s.study_id"
        )
        rows = self.database.transact(lambda session: session.execute(query, {"key": STUDY}).all())
        return {row[0]: (row[1], json.loads(row[2])) for row in rows}

    def locked(self, name: str) -> AbstractContextManager[None]:
        """Hold the lock of this name among all users of the storage."""
        return lock(self._home, name)

    def transact(self, step: Callable[[], T], *, lock: str = "") -> T:
        """Call step() with this lock held; on a server all of it is one transaction, retried as a whole."""
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
            done: T = self.database.transact(whole)
        except BaseException:
            self._forget()
            raise
        return done

    def _forget(self) -> None:
        """Read everything again: the memory may have trials that were created, or ended, in a transaction undone."""
        self.rollbacks += 1
        for memory in (self._indexes, self._directions, self._ranges, self._records):
            memory.clear()

    def transact_ask(self, study_id: int, step: Callable[[], T], *, lock: str) -> T:
        """Like transact, for a step that asks for a candidate: it reads little of the trials that run elsewhere.

        On a server most of that is read before the lock is taken, because other supervisors wait for the lock. From a
        file trials are read once: what others report meanwhile counts for the next candidate.
        """
        self._asking = self.shared
        self._read = None if self.shared else set()
        try:
            if self.shared:
                self.transact(lambda: self.index(study_id))
            return self.transact(step, lock=lock)
        finally:
            self._asking, self._read = False, None

    def create_trial(self, study_id: int, template: FrozenTrial) -> FrozenTrial:
        """Create a trial with the contents of the template and return it; not to be changed."""
        trial = create_trial(self.database, study_id, template)
        if study_id in self._indexes:
            self._indexes[study_id].update([trial])
        return trial

    def set_param(self, study_id: int, trial_id: int, name: str, value: float, within: BaseDistribution) -> None:
        """Store a parameter of a trial, in Optuna's internal representation."""
        set_param(self.database, trial_id, name, value, within, self._ranges.get((study_id, name)))
        self._ranges.setdefault((study_id, name), within)

    def end_trial(self, trial: FrozenTrial, state: optuna.trial.TrialState, values: Any) -> None:
        """End a trial as Study.tell of Optuna does, without its reads: no sampler of ours has anything to add.

        A pruned trial gets the value of its last report, as there.
        """
        if state is optuna.trial.TrialState.PRUNED and trial.last_step is not None:
            last = trial.intermediate_values[trial.last_step]
            values = None if math.isnan(last) else [last]
        self.database.set_trial_state_values(trial_id_of(trial), state, values)

    def beat(self, trial_ids: Iterable[int]) -> None:
        """Write a heartbeat for these trials (Optuna's ids), by the server's clock; without any, ask if it answers."""
        self.database.transact(lambda session: session.execute(text("SELECT 1")))
        for trial_id in trial_ids:
            self.database.record_heartbeat(trial_id)

    def paused(self, study_id: int, chosen: Callable[[str], bool]) -> list[int]:
        """Optuna's ids of the paused trials of a study whose leases are chosen, without the index of this object."""
        query = text(
            "SELECT t.trial_id, s.value_json FROM trials t "
            "JOIN trial_user_attributes s ON s.trial_id = t.trial_id AND s.key = :start "
            "JOIN trial_user_attributes p ON p.trial_id = t.trial_id AND p.key = :pause "
            "WHERE t.study_id = :study AND t.state = 'RUNNING' AND p.value_json <> '0'"
        )
        values = {"study": study_id, "start": START, "pause": PAUSE}
        rows = self.database.transact(lambda session: session.execute(query, values).all())
        return [row[0] for row in rows if chosen(json.loads(row[1]).get("lease", ""))]

    def silent(self, study_id: int) -> set[int]:
        """The numbers of running trials without a heartbeat for GRACE_SECONDS, by the server's clock.

        A trial that never had one, because its process died before, gets its first here, so that its time runs too.
        """
        values = {"study": study_id, "grace": liveness.GRACE_SECONDS}
        rows = self.database.transact(lambda session: session.execute(text(liveness.HEARTBEATS), values).all())
        for trial_id in (row[0] for row in rows if row[2]):
            with suppress(IntegrityError, StorageInternalError):  # it has just written its first one
                self.database.record_heartbeat(trial_id)
        return {row[1] for row in rows if row[3]}

    def close(self) -> None:
        """Close the connections."""
        self.database.scoped_session.remove()
        self.database.engine.dispose()


class _Connection(sqlite3.Connection):
    """Waits for the disk at checkpoints only: a power cut may undo the last seconds, a kill undoes nothing."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.execute("PRAGMA synchronous=NORMAL")


def open_storage(home: Home) -> Storage:
    """Open the study storage; it is created if there is none, by one process at a time. Raises StoreError."""
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
    # Optuna's warnings of its experimental parts are not for our users. They are filtered once: catch_warnings around
    # each call is not safe while the tracker's thread uses it too.
    warnings.filterwarnings("ignore", module="optuna")
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    home.create()
    # Optuna fills {} templates in an address; a folder may have braces in its name.
    url = home.storage_url.replace("{", "{{").replace("}", "}}")
    # Many supervisors that open an existing storage at once need not queue for it.
    with store_errors(home), nullcontext() if home.shared and _exists(home) else lock(home, "storage"):
        if not home.shared:
            _write_ahead(shown_url(home))
            options: dict[str, Any] = {"connect_args": {"timeout": _BUSY_SECONDS, "factory": _Connection}}
            return Storage(home, Retrying(RDBStorage(url, engine_kwargs=options)))
        options = {"connect_args": SERVER_ARGUMENTS, "pool_size": 1, "max_overflow": 8, "pool_pre_ping": True}
        return Storage(home, Retrying(RDBStorage(url, engine_kwargs=options)))


def _exists(home: Home) -> bool:
    with suppress(StoreError), reading(home.storage_url) as reader:  # opening it raises the error
        return reader is not None and bool(reader.schema())
    return False


def upgrade_storage(home: Home) -> None:
    """Bring the tables of an older Optuna up to date. Raises StoreError."""
    with store_errors(home), lock(home, "storage"):
        options = {"connect_args": SERVER_ARGUMENTS} if home.shared else {}
        storage = RDBStorage(home.storage_url, engine_kwargs=options, skip_compatibility_check=True)
        storage.upgrade()
        storage.scoped_session.remove()
        storage.engine.dispose()


def _write_ahead(path: str) -> None:
    """Switch the file to write-ahead logging for good: readers and one writer do not wait for each other."""
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
    finally:
        connection.close()


def generations(storage: Storage, name: str) -> dict[int, str]:
    """Generation -> title of every study of that name."""
    matches = map(re.compile(rf"{re.escape(name)}(?:~(\d+))?").fullmatch, storage.studies())
    return {int(match[1] or 1): match.string for match in matches if match}
