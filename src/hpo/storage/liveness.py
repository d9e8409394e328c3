"""Which supervisors are alive: by their lock files on this machine, by heartbeats in the storage on other machines.

Nothing here loads Optuna before a supervisor needs it.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Container, Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from hpo.locks import is_locked, locked, seen_held
from hpo.records import TrialState
from hpo.storage.trial_attrs import ASKED, START, attrs_of, result_of, state_of

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from hpo.storage.optuna_storage import Storage

HEARTBEAT_SECONDS = 15  # between two heartbeats of a supervisor on a server
GRACE_SECONDS = 60  # after which a supervisor without a heartbeat counts as dead
# Trial id, number, whether it never had a heartbeat, and whether its last one is too old, of each running trial.
HEARTBEATS = (
    "SELECT t.trial_id, t.number, h.trial_id IS NULL, h.heartbeat < LOCALTIMESTAMP - make_interval(secs => :grace) "
    "FROM trials t LEFT JOIN trial_heartbeats h ON h.trial_id = t.trial_id "
    "WHERE t.study_id = :study AND t.state = 'RUNNING'"
)
_REMOTE_GRACE = 600.0  # seconds in which a supervisor elsewhere completes a trial's run in MLflow
_FOLDER_ID = "id"  # a file that tells a folder of locks from one at the same path on another machine


@dataclass(frozen=True)
class Holder:
    """The holder of a lease: a supervisor of the study `title`, process pid on host since then (epoch seconds).

    pid and since are 0 on another machine: the storage has only the name of the lease. thaws: its search may continue
    paused trials.
    """

    lease: str
    title: str
    host: str = ""
    pid: int = 0
    since: float = 0.0
    thaws: bool = False


class Lease:
    """A lock file that a supervisor holds until it closes or dies in any way.

    name is stored with each trial of the supervisor. Beside a SQLite storage it is the file's name, which stays valid
    if the machine is renamed. On a server it is machine, folder and file: the lock of another machine or folder cannot
    be checked from here.
    """

    def __init__(self, folder: Path, *, shared: bool, title: str = "", thaws: bool = False) -> None:
        self._folder = folder
        self._path = folder / f"lease-{uuid.uuid4().hex}.lock"
        self._lock = FileLock(self._path, timeout=0, thread_local=False)
        with _probing(folder):
            if not (folder / _FOLDER_ID).exists():
                (folder / _FOLDER_ID).write_text(uuid.uuid4().hex, encoding="ascii")
            self._lock.acquire()
        self.name = f"{_location(folder)}|{self._path.name}" if shared else self._path.name
        self._holder = Holder(self.name, title, socket.gethostname(), os.getpid(), time.time(), thaws)
        self._introduce()

    def _introduce(self) -> None:
        # In a file of its own: probing a lock empties the lock's file.
        with suppress(OSError):  # hpo status has less to show, and others may end trials that it has paused
            self._path.with_suffix(".json").write_text(json.dumps(asdict(self._holder)), encoding="utf-8")

    @property
    def thaws(self) -> bool:
        """Whether the holder's search may continue paused trials."""
        return self._holder.thaws

    def end_search(self) -> None:
        """Tell others that the holder continues no paused trial any more."""
        self._holder = replace(self._holder, thaws=False)
        self._introduce()

    def other_thaws(self) -> bool:
        """Whether another supervisor of the study, in this folder, may continue paused trials."""
        return any(
            each.thaws and each.title == self._holder.title and each.lease != self.name
            for each in holders(self._folder)
        )

    @property
    def stem(self) -> str:
        """A file name that no other lease has."""
        return self._path.stem

    def is_near(self, name: str) -> bool:
        """Whether the lock of the lease of that name is here, so that is_held can tell."""
        return is_near(self._folder, name)

    def is_held(self, name: str) -> bool:
        """Whether any process holds the lease of that name; it must be near."""
        with _probing(self._folder):
            return is_locked(self._folder / name.rpartition("|")[2])

    def close(self) -> None:
        """Release the lease; trials that still run under it count as abandoned from now on."""
        self._lock.release()
        _remove(self._path)


def is_near(folder: Path, name: str) -> bool:
    """Whether the lock of the lease of that name is in this folder and of this machine."""
    location = name.rpartition("|")[0]
    return not location or location == _location(folder)


def host_of(name: str) -> str:
    """The machine of the lease of that name."""
    return name.partition("|")[0] if "|" in name else socket.gethostname()


def _location(folder: Path) -> str:
    """Machine and folder. Two containers may share a name, two machines a folder: both together mean one kernel."""
    with suppress(FileNotFoundError):
        return f"{socket.gethostname()}|{(folder / _FOLDER_ID).read_text(encoding='ascii')}"
    return ""


def clean_leases(folder: Path) -> None:
    """Remove the files of leases that no process holds."""
    with _probing(folder):
        for path in folder.glob("lease-*.lock"):
            if not is_locked(path):
                _remove(path)


def holders(folder: Path) -> list[Holder]:
    """The holders of the leases in this folder, oldest first; read-only, without waiting."""
    living = []
    for path in folder.glob("lease-*.json"):
        with suppress(OSError, ValueError, TypeError):  # just released, or of another version
            holder = Holder(**json.loads(path.read_text(encoding="utf-8")))
            living += [holder] if seen_held(path.with_suffix(".lock")) else []
    return sorted(living, key=lambda holder: holder.since)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_suffix(".json").unlink(missing_ok=True)


def _probing(folder: Path) -> AbstractContextManager[None]:
    # A probe holds the lock for an instant: another probe would see it held, a new lease would find it taken.
    return locked(folder / "leases.lock")


class Heartbeat:
    """A thread that writes heartbeats for the trials of running() (ids of Optuna), until it is closed."""

    def __init__(self, storage: Storage, running: Callable[[], Collection[int]]) -> None:
        self._storage, self._running = storage, running
        self._answered = self._answering_since = time.monotonic()  # the last answer; the first one without a gap
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self._thread.start()

    @property
    def reliable(self) -> bool:
        """Whether missing heartbeats of others mean that they are dead: the server has answered for two intervals.

        After an outage every trial lacks heartbeats, and a supervisor that has just started knows of no outage.
        """
        now = time.monotonic()
        interval = 2 * HEARTBEAT_SECONDS
        return now - self._answered < interval < now - self._answering_since

    def await_reliable(self) -> None:
        """Wait until the heartbeats are reliable; for four intervals at most."""
        deadline = time.monotonic() + 4 * HEARTBEAT_SECONDS
        while not self.reliable and time.monotonic() < deadline:
            time.sleep(0.1)

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join(5)

    def _beat(self) -> None:
        from optuna.exceptions import OptunaError
        from sqlalchemy.exc import SQLAlchemyError

        while not self._ended.wait(HEARTBEAT_SECONDS):
            try:
                with suppress(KeyError):  # a trial that was deleted
                    self._storage.beat(self._running())
            except (SQLAlchemyError, OptunaError):
                continue
            now = time.monotonic()
            # A long gap: the server was unavailable, or this process was suspended.
            if now - self._answered > 2 * HEARTBEAT_SECONDS:
                self._answering_since = now
            self._answered = now


class Liveness:
    """The supervisors of one study, as the holder of `lease` sees them; running() gives the ids of its own trials."""

    def __init__(self, storage: Storage, study_id: int, lease: Lease, running: Callable[[], Collection[int]]) -> None:
        self._storage, self._id, self._lease = storage, study_id, lease

        def beating() -> list[int]:
            # The checkpoints of trials that were paused here, by whatever run, are in reach of this one only.
            paused = storage.paused(study_id, lease.is_near) if lease.thaws else []
            return [*running(), *paused]

        self._heartbeat = Heartbeat(storage, beating) if storage.shared else None

    def abandoned(self, trials: Iterable[FrozenTrial], *, mine: Container[int]) -> list[FrozenTrial]:
        """The running trials of dead supervisors; those of this supervisor whose numbers are not in `mine`, too."""
        silent = self._silent()

        def is_abandoned(trial: FrozenTrial) -> bool:
            if state_of(trial) is not TrialState.RUNNING or START not in trial.user_attrs:
                return False
            lease = attrs_of(trial).lease
            if lease == ASKED:
                return False
            if lease == self._lease.name:
                return trial.number not in mine  # killed between starting it and writing its record
            return not self._lease.is_held(lease) if self._lease.is_near(lease) else trial.number in silent

        return [trial for trial in trials if is_abandoned(trial)]

    def has_far(self, trials: Iterable[FrozenTrial]) -> bool:
        """Whether one of the trials is of another machine or folder."""
        return not all(self._lease.is_near(attrs_of(trial).lease) for trial in trials)

    def given_up(self, paused: Iterable[FrozenTrial]) -> list[int]:
        """The numbers of the paused trials that no other living supervisor can continue: their checkpoints are near it.

        Trials that were paused elsewhere have heartbeats of those that can.
        """
        elsewhere, silent = self._lease.other_thaws(), self._silent()
        return [
            trial.number
            for trial in paused
            if (not elsewhere if self._lease.is_near(attrs_of(trial).lease) else trial.number in silent)
        ]

    def trials_of_others(self, trials: Iterable[FrozenTrial]) -> set[int]:
        """The numbers of the trials that another living supervisor is responsible for, see Study.trials_of_others."""
        numbers, silent, now = set(), self._silent(), time.time()
        living: dict[str, bool] = {self._lease.name: False, "": False, ASKED: False}
        for trial in trials:
            lease = attrs_of(trial).lease
            if self._lease.is_near(lease):
                if lease not in living:
                    living[lease] = self._lease.is_held(lease)
                theirs = living[lease]
            elif trial.state.is_finished():
                result = result_of(trial)
                theirs = result is not None and now - result.ended < _REMOTE_GRACE
            else:
                theirs = trial.number not in silent
            numbers |= {trial.number} if theirs else set()
        return numbers

    def listen(self) -> None:
        """Wait until missing heartbeats would mean that a supervisor is dead, see Heartbeat."""
        if self._heartbeat is not None:
            self._heartbeat.await_reliable()

    def close(self) -> None:
        """Write no more heartbeats."""
        if self._heartbeat is not None:
            self._heartbeat.close()

    def _silent(self) -> set[int]:
        """The numbers of running trials whose supervisor, on any machine, has no heartbeat."""
        return self._storage.silent(self._id) if self._heartbeat is not None and self._heartbeat.reliable else set()
