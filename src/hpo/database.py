"""Open a database only to read it: nothing is made, locked or changed, and no store's library is loaded."""

from __future__ import annotations

import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.distribution import install_command
from hpo.errors import StoreError, shown_address

if TYPE_CHECKING:
    from sqlalchemy import Engine

_BUSY_SECONDS = 20.0

# How a connection to PostgreSQL begins. Optuna compares times that have no zone. A client that is gone without a word,
# or is stuck inside a lock, is noticed within a minute. Poolers in transaction mode know no prepared statements,
# and ignore `options`: the database itself has them then (docs/cluster.md).
_SESSION = {
    "timezone": "UTC",
    "tcp_keepalives_idle": "20",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
    "idle_in_transaction_session_timeout": "60s",
}
SERVER_ARGUMENTS = {
    "connect_timeout": 10,
    "options": " ".join(f"-c {name}={value}" for name, value in _SESSION.items()),
    "prepare_threshold": None,
}

# What databases say -> what to do.
_HINTS = {
    "locked": "Another program keeps the database busy: end it, then run the study again to resume it.",
    "readonly": "Make the file and its folder writable, or choose another folder: --home DIR.",
    "read-only": "Make the file and its folder writable, or choose another folder: --home DIR.",
    "unable to open": "Check the folder and its permissions, or choose another: --home DIR.",
    "not a database": "The file is something else: move it away, or choose another folder: --home DIR.",
    "malformed": "The file is damaged: restore it from a copy, or move it away.",
    "full": "Free some space on the disk, then run the study again to resume it.",
    "no longer compatible": "It was written by another version of Optuna: hpo store upgrade.",
    "no module named": f"Install the driver: {install_command('postgres')}.",
    "password": "Give it where libpq finds it: PGPASSWORD, or a line in ~/.pgpass (chmod 600), see docs/cluster.md.",
    "does not exist": "Make it, or correct the address in HPO_STORAGE or hpo.toml.",
    "too many clients": "Put a connection pooler before the server, or raise its max_connections: docs/cluster.md.",
    "connection": "Start the server, or correct the address in HPO_STORAGE or hpo.toml.",
}


def hint_of(message: str) -> str:
    """What to do where a database says this; "" where nothing is known of it."""
    return next((hint for words, hint in _HINTS.items() if words in message.lower()), "")


def is_damaged(message: str) -> bool:
    """Whether a database says in this that its file is damaged."""
    return any(words in message.lower() for words in ("malformed", "not a database"))


def server_address(url: str) -> str:
    """The address of a database on a server, with the driver that we install named in it."""
    return re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", url)


def server_engine(url: str) -> Engine:
    """An engine for a PostgreSQL server that keeps no connection when it is not in use."""
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    return create_engine(url, poolclass=NullPool, connect_args=SERVER_ARGUMENTS)


def sqlite_address(file: Path) -> str:
    """The address of a SQLite file: what would begin options, or read as a sign in hexadecimal digits, is quoted."""
    path = re.sub(r"%(?=[0-9A-Fa-f]{2})", "%25", str(file)).replace("?", "%3F")
    return f"sqlite:///{path}"


def sqlite_file(url: str) -> Path | None:
    """The file of a SQLite address, absolute; None for a database on a server."""
    if not url.startswith("sqlite:"):
        return None
    path = url.removeprefix("sqlite:///")
    if path != url and not set(path) & set("%?"):  # SQLAlchemy, which knows what these mean, takes long to import
        return Path(path).absolute()
    from sqlalchemy.engine import make_url

    return Path(make_url(url).database or "").absolute()


class Reader:
    """Questions to an open database on a server, in SQL that SQLite, PostgreSQL and MySQL share."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def rows(self, query: str, **values: Any) -> Sequence[Any]:
        """All rows; values fill the :names of the query."""
        from sqlalchemy import text

        found: Sequence[Any] = self._connection.execute(text(query), values).all()
        return found

    def json_without(self, column: str, keys: Sequence[str]) -> str:  # noqa: ARG002 - of SQLite
        """SQL for a column's JSON object, without these keys where the database can leave them out; else whole."""
        return column

    def tables(self) -> set[str]:
        """The names of its tables."""
        from sqlalchemy import inspect

        return set(inspect(self._connection).get_table_names())

    def schema(self) -> str:
        """The schema version that alembic recorded; "" where there is none."""
        found = self.rows("SELECT version_num FROM alembic_version") if "alembic_version" in self.tables() else ()
        return str(found[0][0]) if found else ""


class _FileReader(Reader):
    """Questions to a SQLite file, without SQLAlchemy."""

    def rows(self, query: str, **values: Any) -> Sequence[Any]:
        return list(self._connection.execute(query, values))

    def json_without(self, column: str, keys: Sequence[str]) -> str:
        if not keys:
            return column
        # Python writes NaN and infinities, which SQLite does not accept as JSON.
        paths = ", ".join(f"'$.{key}'" for key in keys)
        return f"CASE WHEN json_valid({column}) THEN json_remove({column}, {paths}) ELSE {column} END"

    def tables(self) -> set[str]:
        return {name for (name,) in self.rows("SELECT name FROM sqlite_master WHERE type = 'table'")}


@contextmanager
def reading(url: str) -> Iterator[Reader | None]:
    """A reader of the database at this address; None where its SQLite file is not there. Raises StoreError."""
    file = sqlite_file(url)
    if file is not None and not file.is_file():
        yield None
        return
    if file is not None:
        try:
            with closing(open_read_only(file)) as opened:
                yield _FileReader(opened)
        except sqlite3.Error as error:
            raise _unreadable(str(file), error) from None
        return
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with server_engine(url).connect() as connection:
            yield Reader(connection)
    except (SQLAlchemyError, ImportError) as error:
        raise _unreadable(shown_address(url), error) from None


def _unreadable(place: str, error: Exception) -> StoreError:
    text = str(getattr(error, "orig", None) or error).splitlines()[0].rstrip(".")
    hint = hint_of(text) or "Check the database, or restore it from a copy."
    return StoreError(f"{place}: the database cannot be read: {text}.", hint)


def open_read_only(file: Path) -> sqlite3.Connection:
    """A connection to a SQLite file that changes nothing, in a folder that cannot be written too. Raises sqlite3.Error.

    What a killed process has left in the write-ahead log is read as well.
    """
    try:
        return _connect(file, "mode=ro")
    except sqlite3.OperationalError as error:
        if "unable to open" not in str(error):
            raise
    # A log on a read-only disk, where SQLite cannot make the index of it.
    log = file.with_name(f"{file.name}-wal")
    if not log.is_file() or not log.stat().st_size:
        return _connect(file, "immutable=1")
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    with tempfile.TemporaryDirectory() as folder:
        for each in (file, log):
            shutil.copyfile(each, Path(folder) / each.name)
        with closing(sqlite3.connect(Path(folder) / file.name)) as copy:
            copy.backup(connection)
    return connection


def _connect(file: Path, mode: str) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{file.as_uri()}?{mode}", uri=True, timeout=_BUSY_SECONDS)
    try:
        connection.execute("PRAGMA schema_version").fetchone()
    except sqlite3.Error:
        connection.close()
        raise
    return connection
