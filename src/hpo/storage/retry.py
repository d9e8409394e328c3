"""Calls of the study storage, tried again while their fault may pass: a busy database, a server that restarts."""

from __future__ import annotations

import functools
import inspect
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import InterfaceError, OperationalError

from hpo.errors import disk_full

PATIENCE = 60.0  # seconds from the first refusal to the last try
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0


T = TypeVar("T")


class Patient:
    """In front of Optuna's database storage, whose every method is one transaction: all of it or nothing.

    A method that fails is called again, with growing pauses, until it works, its fault is one that stays, or PATIENCE
    has run out.
    """

    def __init__(self, storage: Any) -> None:
        self._storage = storage
        self._whole = threading.local()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._storage, name)
        if not inspect.ismethod(found) or getattr(self._whole, "begun", False):
            return found
        return _patient(found)

    def at_once(self, step: Callable[[Any], T]) -> T:
        """step(session): all methods that it calls in this thread are one transaction, which is tried again as a whole.

        session is SQLAlchemy's. A step within a step is a part of it. Not for SQLite, where what has read before it
        writes can be refused.
        """
        if getattr(self._whole, "begun", False):
            return step(self._storage.scoped_session())
        done: T = _patient(self._at_once)(step)
        return done

    def _at_once(self, step: Callable[[Any], T]) -> T:
        session = self._storage.scoped_session()
        broken = False

        def roll_back() -> None:
            nonlocal broken
            broken = True
            type(session).rollback(session)

        # How Optuna ends each of its steps; what it rolls back takes all the others with it.
        session.commit, session.rollback, session.close = session.flush, roll_back, session.expire_all
        self._whole.begun = True
        try:
            result = step(session)
        except BaseException:
            broken = True
            raise
        finally:
            self._whole.begun = False
            del session.commit, session.rollback, session.close
            if broken:
                session.close()
        if broken:
            gone = OperationalError("", None, Exception("a part of it was rolled back"))
            raise StorageInternalError("the step was rolled back") from gone
        try:
            session.commit()
        finally:
            session.close()
        return result


def _patient(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def patient(*arguments: Any, **options: Any) -> Any:
        pause, deadline = _FIRST_PAUSE, None
        while True:
            try:
                return call(*arguments, **options)
            except Exception as error:
                now = time.monotonic()
                deadline = now + PATIENCE if deadline is None else deadline
                if now + pause > deadline or not passes(error):
                    raise
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    return patient


def passes(error: BaseException) -> bool:
    """Whether a storage fault may be over soon: a lock that another process holds, a server that does not answer."""
    if disk_full(error):
        return False
    if isinstance(error, OperationalError | InterfaceError):
        text = str(error.orig).lower()
        return "locked" in text if "sqlite3" in type(error.orig).__module__ else True
    return error.__cause__ is not None and passes(error.__cause__)
