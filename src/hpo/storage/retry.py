"""Faults of the study storage: calls are retried while the fault may pass, and fail with a StoreError after that."""

from __future__ import annotations

import functools
import inspect
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from optuna.exceptions import OptunaError, StorageInternalError
from sqlalchemy.engine import make_url
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session

from hpo.database import hint_of
from hpo.errors import StoreError, disk_full, shown_address
from hpo.home import Home

RETRY_SECONDS = 60.0  # from the first fault to the last try
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0

T = TypeVar("T")
Method = TypeVar("Method", bound=Callable[..., Any])


class Retrying:
    """A proxy of Optuna's RDBStorage, whose every method is one transaction.

    A method that fails is called again, with growing pauses, until it succeeds, its fault is a lasting one, or
    RETRY_SECONDS have passed.
    """

    def __init__(self, storage: Any) -> None:
        self._storage = storage
        self._transaction = threading.local()

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._storage, name)
        if not inspect.ismethod(attribute) or getattr(self._transaction, "begun", False):
            return attribute
        return _retried(attribute)

    def transact(self, step: Callable[[Any], T]) -> T:
        """Call step(session) in one transaction, which is retried as a whole; session is SQLAlchemy's.

        All methods that step calls in this thread are part of the transaction, and so is a step within a step. On
        SQLite a step may only read: a transaction that writes after it has read can be refused there.
        """
        if getattr(self._transaction, "begun", False):
            return step(self._storage.scoped_session())
        result: T = _retried(self._transact)(step)
        return result

    def _transact(self, step: Callable[[Any], T]) -> T:
        sessions = self._storage.scoped_session
        sessions.remove()
        session = _JoinedSession(self._storage.engine)
        sessions.registry.set(session)
        self._transaction.begun = True
        try:
            result = step(session)
            if session.rolled_back:
                fault = OperationalError("", None, Exception("a part of it was rolled back"))
                raise StorageInternalError("the step was rolled back") from fault
            session.end()
        finally:
            self._transaction.begun = False
            sessions.registry.clear()
            Session.close(session)  # and with it what was not committed
        return result


class _JoinedSession(Session):
    """The session of a transaction that several methods of Optuna take part in.

    Optuna commits and closes the session of this thread at the end of each method. Here that only flushes it; end()
    commits. A method that rolls back undoes all of the transaction.
    """

    rolled_back = False

    def commit(self) -> None:
        """Send the changes, without ending the transaction."""
        self.flush()

    def rollback(self) -> None:
        """Undo all of the transaction."""
        self.rolled_back = True
        super().rollback()

    def close(self) -> None:
        """Have everything read again by the next method."""
        self.expire_all()

    def end(self) -> None:
        """Commit."""
        super().commit()


def _retried(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def retried(*arguments: Any, **options: Any) -> Any:
        pause, deadline = _FIRST_PAUSE, None
        while True:
            try:
                return call(*arguments, **options)
            except Exception as error:
                now = time.monotonic()
                deadline = now + RETRY_SECONDS if deadline is None else deadline
                if now + pause > deadline or not is_temporary(error):
                    raise
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    return retried


def is_temporary(error: BaseException) -> bool:
    """Whether a fault of the storage may pass: a lock of another process, a server that does not answer."""
    if disk_full(error):
        return False
    if isinstance(error, OperationalError | InterfaceError):
        text = str(error.orig).lower()
        return "locked" in text if "sqlite3" in type(error.orig).__module__ else True
    return error.__cause__ is not None and is_temporary(error.__cause__)


@contextmanager
def store_errors(home: Home) -> Iterator[None]:
    """Turn the errors of Optuna, SQLAlchemy and SQLite in the block into one StoreError with place and next step."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, OptunaError, RuntimeError, ImportError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = str(getattr(cause, "orig", None) or cause).splitlines()[0].rstrip(".")
        hint = hint_of(text) or "Check the database, then run again."
        raise StoreError(f"{shown_url(home)}: the study storage refuses: {text}.", hint) from error


def guarded(method: Method) -> Method:
    """A method that turns faults of the storage into StoreError; its object has a _home."""

    @functools.wraps(method)
    def called(self: Any, *args: Any, **options: Any) -> Any:
        with store_errors(self._home):
            return method(self, *args, **options)

    return cast("Method", called)


def shown_url(home: Home) -> str:
    """The storage as a message may name it: a path, or an address without its password."""
    if home.shared:
        return shown_address(home.storage_url)
    return make_url(home.storage_url).database or "memory"
