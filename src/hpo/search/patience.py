"""Calls of the study storage, tried again while their fault may pass: a busy database, a server that restarts."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy.exc import InterfaceError, OperationalError

from hpo.errors import disk_full

PATIENCE = 60.0  # seconds from the first refusal to the last try
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0


class Patient:
    """In front of Optuna's database storage, whose every method is one transaction: all of it or nothing.

    A method that fails is called again, with growing pauses, until it works, its fault is one that stays, or PATIENCE
    has run out.
    """

    def __init__(self, storage: Any) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._storage, name)
        return _patient(found) if inspect.ismethod(found) else found


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
