"""One lease a supervisor: a lock that the system frees when its process dies."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from hpo.locks import locked

_MARK = "id"  # a file in the folder of locks, which tells it from another machine's of the same path


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
    enough, whatever the machine is called today; where a server is shared, the name is that of the machine, of the
    folder and of the file. The lock of another machine, or folder, cannot be seen from here.
    """

    def __init__(self, folder: Path, *, shared: bool, title: str = "") -> None:
        self._folder = folder
        self._path = folder / f"lease-{uuid.uuid4().hex}.lock"
        self._lock = FileLock(self._path, timeout=0, thread_local=False)
        with _probing(folder):
            if not (folder / _MARK).exists():
                (folder / _MARK).write_text(uuid.uuid4().hex, encoding="ascii")
            self._lock.acquire()
        self.name = f"{_here(folder)}|{self._path.name}" if shared else self._path.name
        # Beside the lock, not in it: whoever probes a lock empties its file.
        holder = Holder(self.name, title, socket.gethostname(), os.getpid(), time.time())
        with suppress(OSError):  # it holds all the same; only hpo status knows less
            self._path.with_suffix(".json").write_text(json.dumps(asdict(holder)), encoding="utf-8")

    @property
    def stem(self) -> str:
        """A file name that no other lease has."""
        return self._path.stem

    def near(self, name: str) -> bool:
        """Whether the lease of that name has its lock here, so that alive knows."""
        return is_near(self._folder, name)

    def alive(self, name: str) -> bool:
        """Whether the lease of that name is held by anyone; it must be near."""
        with _probing(self._folder):
            return _held(self._folder / name.rpartition("|")[2])

    def close(self) -> None:
        """Give the lease up; what still runs under it counts as dead from now on."""
        self._lock.release()
        _remove(self._path)


def is_near(folder: Path, name: str) -> bool:
    """Whether the lock of the lease of that name lies in this folder, and is of a process of this machine."""
    place = name.rpartition("|")[0]
    return not place or place == _here(folder)


def host_of(name: str) -> str:
    """The machine that a lease's name tells of."""
    return name.partition("|")[0] if "|" in name else socket.gethostname()


def _here(folder: Path) -> str:
    """Machine and folder. Two containers may share a name, two machines a folder: both together mean one kernel."""
    with suppress(FileNotFoundError):
        return f"{socket.gethostname()}|{(folder / _MARK).read_text(encoding='ascii')}"
    return ""


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
