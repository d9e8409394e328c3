"""What the study storage's databases refuse, told with its place and the next step."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

import optuna
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from hpo.database import hint_of
from hpo.errors import StoreError
from hpo.home import Home


@contextmanager
def store_errors(home: Home) -> Iterator[None]:
    """What Optuna, SQLAlchemy and SQLite raise in the block becomes one StoreError with place and next step."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, optuna.exceptions.OptunaError, RuntimeError, ImportError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        said = str(getattr(cause, "orig", None) or cause).splitlines()[0].rstrip(".")
        hint = hint_of(said) or "Check the database, then run again."
        raise StoreError(f"{shown_url(home)}: the study storage refuses: {said}.", hint) from error


def shown_url(home: Home) -> str:
    """The storage as a message may name it: a path, or an address without its password."""
    try:
        url = make_url(home.storage_url)
    except SQLAlchemyError:
        return "HPO_STORAGE"
    return url.render_as_string(hide_password=True) if home.shared else url.database or "memory"
