"""What the study storage's databases refuse, told with its place and the next step."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

import optuna
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from hpo.errors import StoreError
from hpo.home import Home

# What databases say -> what to do.
_HINTS = {
    "locked": "Another program keeps the database busy: end it, then run the study again to go on.",
    "readonly": "Make the file and its folder writable, or choose another folder: --home DIR.",
    "read-only": "Make the file and its folder writable, or choose another folder: --home DIR.",
    "unable to open": "Check the folder and its permissions, or choose another: --home DIR.",
    "not a database": "The file is something else: move it away, or choose another folder: --home DIR.",
    "malformed": "The file is damaged: restore it from a copy, or move it away.",
    "full": "Free some space on the disk, then run the study again to go on.",
    "no longer compatible": "It was written by another version of Optuna: hpo store upgrade.",
    "no module named": 'Install the driver: pip install "hpo[postgres]".',
    "password": "Correct HPO_STORAGE, or name the password where libpq finds it: PGPASSWORD or ~/.pgpass.",
    "does not exist": "Make it, or correct the address in HPO_STORAGE or hpo.toml.",
    "too many clients": "Put a connection pooler before the server, or raise its max_connections: docs/cluster.md.",
    "connection": "Start the server, or correct the address in HPO_STORAGE or hpo.toml.",
}


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
        hint = next((hint for words, hint in _HINTS.items() if words in said.lower()), "")
        raise StoreError(
            f"{shown_url(home)}: the study storage refuses: {said}.", hint or "Check the database, then run again."
        ) from error


def shown_url(home: Home) -> str:
    """The storage as a message may name it: a path, or an address without its password."""
    try:
        url = make_url(home.storage_url)
    except SQLAlchemyError:
        return "HPO_STORAGE"
    return url.render_as_string(hide_password=True) if home.shared else url.database or "memory"
