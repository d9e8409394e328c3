"""Locks that the system frees when their process dies: short ones around a step, and one lease a supervisor."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from hpo.errors import StoreError

_PATIENCE_SECONDS = 120.0


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file for the time of the block. Raises StoreError after two minutes, or where it cannot be made."""
    try:
        lock = FileLock(path, timeout=_PATIENCE_SECONDS, thread_local=False)
        lock.acquire()
    except Timeout:
        raise StoreError(
            f"{path}: another process has held this lock for {_PATIENCE_SECONDS:.0f} s.",
            "See whether an hpo process hangs or is suspended, and end it.",
        ) from None
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be locked: {error.strerror}.", "Choose a folder of your own: --home DIR."
        ) from None
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True)
class Holder:
    """Who holds a lease: a supervisor of the study `title`, running on host as process pid since then (epoch seconds).

    pid and since are 0 for one on another machine, of which the storage has the lease's name only.
    """

    lease: str
    title: str
    host: str = ""
    pid: int = 0
    since: float = 0.0


class Lease:
    """Proof of life: a lock file that its holder keeps until it closes or dies, however it dies.

    name is what a trial's record says of its supervisor. Where the storage lies beside the locks the file's name is
    enough, whatever the machine is called today; where a server is shared, the name holds machine and path, and a
    lease of another machine counts as alive, since its lock cannot be seen from here.
    """

    def __init__(self, folder: Path, *, shared: bool, title: str = "") -> None:
        self._folder = folder
        self._path = folder / f"lease-{uuid.uuid4().hex}.lock"
        self.name = f"{socket.gethostname()}|{self._path}" if shared else self._path.name
        self._lock = FileLock(self._path, timeout=0, thread_local=False)
        with _probing(folder):
            self._lock.acquire()
        # Beside the lock, not in it: whoever probes a lock empties its file.
        holder = Holder(self.name, title, socket.gethostname(), os.getpid(), time.time())
        with suppress(OSError):  # it holds all the same; only hpo status knows less
            self._path.with_suffix(".json").write_text(json.dumps(asdict(holder)), encoding="utf-8")

    @property
    def stem(self) -> str:
        """A file name that no other lease has."""
        return self._path.stem

    def near(self, name: str) -> bool:
        """Whether the lease of that name is of this machine, so that alive knows for sure."""
        return name.rpartition("|")[0] in ("", socket.gethostname())

    def alive(self, name: str) -> bool:
        """Whether the lease of that name is held by anyone."""
        host, _, file = name.rpartition("|")
        if host and host != socket.gethostname():
            return True
        with _probing(self._folder):
            return _held(self._folder / file)

    def close(self) -> None:
        """Give the lease up; what still runs under it counts as dead from now on."""
        self._lock.release()
        _remove(self._path)


def clean_leases(folder: Path) -> None:
    """Remove lease files that nobody holds."""
    with _probing(folder):
        for path in folder.glob("lease-*.lock"):
            if not _held(path):
                _remove(path)


def holders(folder: Path) -> list[Holder]:
    """Who holds a lease here now; nothing is made, changed or waited for."""
    found = []
    for path in folder.glob("lease-*.json"):
        with suppress(OSError, ValueError, TypeError):  # just given up, or of another version
            holder = Holder(**json.loads(path.read_text(encoding="utf-8")))
            found += [holder] if seen_held(path.with_suffix(".lock")) else []
    return sorted(found, key=lambda holder: holder.since)


def seen_held(path: Path) -> bool:
    """Whether anyone holds a lock file, for those who only look: without its folder's lock, and on read-only disks.

    Only for a lease that has been held before: one that is being taken must not find a probe in its place.
    """
    try:
        import fcntl
    except ImportError:
        return _held(path)
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)  # which ends the probe
    return False


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_suffix(".json").unlink(missing_ok=True)


def _probing(folder: Path) -> AbstractContextManager[None]:
    # A probe takes the lock for an instant: a second one would see it held, a new lease would find it taken.
    return locked(folder / "leases.lock")


def _held(path: Path) -> bool:
    if not path.exists():
        return False
    probe = FileLock(path, timeout=0, thread_local=False)
    try:
        probe.acquire()
    except Timeout:
        return True
    probe.release()
    return False
