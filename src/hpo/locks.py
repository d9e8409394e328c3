"""Locks that the death of their holder frees: files next to a SQLite storage, advisory locks on a PostgreSQL server."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from hpo.database import server_engine
from hpo.errors import StoreError
from hpo.home import Home

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.orm import Session

_PATIENCE_SECONDS = 120.0
_LONGEST_MINUTES = 30  # after which a server frees the lock of a holder that is stuck
_LOCK_TIMEOUT = "55P03"  # PostgreSQL's lock_not_available


@contextmanager
def lock(home: Home, name: str) -> Iterator[None]:
    """Hold the lock of this name among all that share the study storage; for steps that are rare. Raises StoreError."""
    if not home.shared:
        with locked(home.locks / f"{name}.lock"):
            yield
        return
    with _server_lock(server_engine(home.storage_url), name):
        yield


def ask_lock(title: str) -> str:
    """The name of the lock under which candidates of the study with this title are handed out."""
    return f"{title}.ask"


def ensemble_lock(title: str) -> str:
    """The name of the lock under which an ensemble of the study with this title is recorded."""
    return f"{title}.ensemble"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file for the time of the block. Raises StoreError after two minutes, or where it cannot be made."""
    try:
        held = FileLock(path, timeout=_PATIENCE_SECONDS, thread_local=False)
        held.acquire()
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
        held.release()


def seen_held(path: Path) -> bool:
    """Whether any process holds a lock file: read-only, without the folder's lock, for read-only disks too.

    Only for a lease that has been held before: a new one could find this probe in its place.
    """
    try:
        import fcntl
    except ImportError:
        return is_locked(path)
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


def is_locked(path: Path) -> bool:
    """Whether any process holds a lock file, by taking it for an instant."""
    if not path.exists():
        return False
    probe = FileLock(path, timeout=0, thread_local=False)
    try:
        probe.acquire()
    except Timeout:
        return True
    probe.release()
    return False


@contextmanager
def _server_lock(engine: Engine, name: str) -> Iterator[None]:
    """Hold the advisory lock of this name on a PostgreSQL server for the time of the block, in a connection of its own.

    Who waits is in no transaction: behind a pooler, the holder may need its place for the work. Raises StoreError after
    two minutes, and SQLAlchemy's errors where the server does not answer.
    """
    from sqlalchemy import text
    from sqlalchemy.exc import DBAPIError

    deadline, pause = time.monotonic() + _PATIENCE_SECONDS, 0.02
    connection = engine.connect()
    try:
        while not connection.execute(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": _key(name)}).scalar():
            connection.rollback()
            if time.monotonic() > deadline:
                raise _held(name)
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
        # What is done under it uses other connections: this one is idle, for longer than others may be.
        connection.execute(text(f"SET LOCAL idle_in_transaction_session_timeout = '{_LONGEST_MINUTES}min'"))
        yield
    finally:
        with suppress(DBAPIError):  # a connection that broke has freed it
            connection.rollback()
        with suppress(DBAPIError):
            connection.close()


def hold(session: Session, name: str) -> None:
    """Take the advisory lock of this name for the rest of the session's transaction, in which all of the work is done.

    So a connection pooler in transaction mode keeps it, and the server frees it with the connection. Raises StoreError
    after two minutes, and SQLAlchemy's errors where the server does not answer.
    """
    from sqlalchemy import text
    from sqlalchemy.exc import OperationalError

    session.execute(text(f"SET LOCAL lock_timeout = '{_PATIENCE_SECONDS:.0f}s'"))
    try:
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _key(name)})
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", "") != _LOCK_TIMEOUT:
            raise
        raise _held(name) from None


def _key(name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"hpo {name}".encode()).digest()[:8], signed=True)


def _held(name: str) -> StoreError:
    return StoreError(
        f"the lock {name!r} of the study storage has been held for {_PATIENCE_SECONDS:.0f} s.",
        "See whether an hpo process hangs or is suspended, and end it.",
    )
