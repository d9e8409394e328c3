"""The way into MLflow: imported late, with its telemetry off, and with its faults told as StoreError."""

from __future__ import annotations

import errno
import functools
import logging
import os
import re
import socket
import sqlite3
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from urllib.parse import urlsplit

from filelock import FileLock

from hpo.database import sqlite_address
from hpo.errors import HpoError, StoreAwayError, StoreError, disk_full
from hpo.home import Home

P = ParamSpec("P")
R = TypeVar("R")

# Read by MLflow when it is imported or called; what the user has set stays.
SWITCHES = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # MLflow would try for minutes, and what it sends again blindly can be there twice: we look first.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # seconds
    "MLFLOW_LOG_UV_FILES": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # standard output belongs to the command
    "MLFLOW_UV_AUTO_DETECT": "false",  # else the working directory's lock file becomes the model's requirements
}


def load_mlflow() -> Any:
    """The module mlflow; the first call takes seconds."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
    import mlflow

    # It logs a traceback for every database error that it also raises.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    return mlflow


def knock(home: Home) -> None:
    """See whether the tracking store is there and takes writes, in milliseconds. Raises StoreError."""
    if _is_server(home):
        _knock(home.tracking_uri)
    elif home.embedded and exists(home):
        _try_file(home.root / "mlflow.db")


@functools.lru_cache
def connect(home: Home) -> Any:
    """The MlflowClient of a home; its database is made where there is none. Raises StoreError."""
    with _faults_told(home):
        if _is_server(home):
            _knock(home.tracking_uri)
            return load_mlflow().MlflowClient(home.tracking_uri, home.tracking_uri)
        # MLflow's first migrations race where several processes open a fresh database.
        with lock(home, "mlflow-create"), quiet("alembic"):
            if home.embedded:
                if not exists(home):
                    _make_file(home.root / "mlflow.db")
                _try_file(home.root / "mlflow.db")
            client = load_mlflow().MlflowClient(home.tracking_uri, home.tracking_uri)
            client.search_registered_models(max_results=1)  # the registry's store opens at its first use
        if home.embedded:
            _write_ahead(home.root / "mlflow.db", client._tracking_client.store.engine)
        return client


def server_version(home: Home) -> str:
    """The version of the MLflow server. Raises StoreError where nobody answers, or somebody else."""
    import requests

    _knock(home.tracking_uri)
    with _faults_told(home):
        answer = requests.get(f"{home.tracking_uri.rstrip('/')}/version", timeout=10)
        answer.raise_for_status()
    return answer.text.strip()


def upgrade_tracking(home: Home) -> None:
    """Bring the tables of an older MLflow up to date. Raises StoreError."""
    with _faults_told(home), lock(home, "mlflow-create"), quiet("alembic"):
        load_mlflow()
        from mlflow.store.db.utils import _upgrade_db, create_sqlalchemy_engine

        engine = create_sqlalchemy_engine(home.tracking_uri)
        _upgrade_db(engine)
        engine.dispose()


def _is_server(home: Home) -> bool:
    return home.tracking_uri.startswith(("http://", "https://"))


def _make_file(path: Path) -> None:
    """Make a database with all its tables, or none: a process killed in the migrations leaves what nobody can open."""
    load_mlflow()
    from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine

    part = path.with_name(f"{path.name}.part")
    for left in path.parent.glob(f"{part.name}*"):
        left.unlink()
    engine = create_sqlalchemy_engine(sqlite_address(part))
    _initialize_tables(engine)
    engine.dispose()
    part.replace(path)


def _write_ahead(path: Path, engine: Any) -> None:
    """As in the study storage: no commit waits for the disk, which is half of what logging a trial takes.

    A kill undoes nothing; a power cut may undo the last seconds, which the next run of a study writes again.
    """
    from sqlalchemy import event

    with closing(sqlite3.connect(path)) as database, suppress(sqlite3.OperationalError):  # busy: the next one's turn
        database.execute("PRAGMA journal_mode=WAL")
    event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=NORMAL"))
    engine.dispose()


def exists(home: Home) -> bool:
    """False where the embedded database has not been made yet, so that looking does not make it."""
    return not home.embedded or (home.root / "mlflow.db").is_file()


def lock(home: Home, name: str) -> FileLock:
    """An inter-process lock of this home, freed by the system when its holder dies."""
    return FileLock(home.create().locks / f"{name}.lock")


def told(method: Callable[P, R]) -> Callable[P, R]:
    """Turn faults of MLflow, its database and the disk into StoreError; the first argument is a Home or has one."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0] if args else kwargs["home"]
        with _faults_told(first if isinstance(first, Home) else first.home):
            return method(*args, **kwargs)

    return call


@contextmanager
def _faults_told(home: Home) -> Iterator[None]:
    try:
        yield
    except HpoError:
        raise
    except Exception as error:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        if not isinstance(error, MlflowException | SQLAlchemyError | OSError):
            raise
        kind = StoreAwayError if _passes(error) else StoreError
        hint = "Free some space on its disk." if disk_full(error) else _HINT
        raise kind(f"MLflow at {shown(home.tracking_uri)}: {_words(error)}.", hint) from error


_HINT = "Check that the folder can be written and has space left, or that the server of MLFLOW_TRACKING_URI is up."
# What MLflow says of a busy or missing database, and the system of a disk or a server that is away.
_BUSY = ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
_AWAY = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTUNREACH)
# The part of a long message that says what happened.
_CORE = re.compile(r"\[Errno -?\d+\] [^'\")]+|too many \d+ error responses|[Rr]ead timed out|Remote end closed \w+")


def _passes(error: Exception) -> bool:
    """Whether the same call may work later: nobody answers, the database is busy, the disk is full."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import ConnectionError as Unreachable
    from requests.exceptions import Timeout
    from sqlalchemy.exc import InterfaceError, OperationalError

    if isinstance(error, MlflowException):
        # How it tells of a request that got no answer, or the answer of a server in trouble (408, 429, 5xx).
        unanswered = re.match(r"API request to \S+ failed with (timeout )?exception", str(error))
        return bool(unanswered) or error.error_code in _BUSY or disk_full(error)
    if isinstance(error, OSError):
        response = getattr(error, "response", None)  # an answer that requests makes an error of
        if response is not None:
            return bool(response.status_code >= 500 or response.status_code in (408, 429))
        return isinstance(error, ConnectionError | TimeoutError | Unreachable | Timeout) or error.errno in _AWAY
    return isinstance(error, OperationalError | InterfaceError)


def _words(error: Exception) -> str:
    text = str(error)
    core = _CORE.search(text) if "API request to" in text else None
    first_line = (text.splitlines() or [type(error).__name__])[0]
    return core[0] if core else first_line.removeprefix("(sqlite3.OperationalError) ").rstrip(".")


def shown(uri: str) -> str:
    """A store's URI without its password."""
    parts = urlsplit(uri)
    return uri.replace(f":{parts.password}@", ":***@") if parts.password else uri


def _knock(uri: str) -> None:
    # MLflow itself would retry for minutes before it says that nobody is there.
    parts = urlsplit(uri)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=10).close()
    except OSError as error:
        raise StoreAwayError(
            f"MLFLOW_TRACKING_URI={shown(uri)}: nothing answers there: {error.strerror or error}.",
            "Start the server, correct the address, or unset MLFLOW_TRACKING_URI to use mlruns/mlflow.db.",
        ) from None


def _try_file(path: Path) -> None:
    # As with servers: MLflow would retry for minutes.
    try:
        with closing(sqlite3.connect(path)) as database:
            (version,) = database.execute("PRAGMA user_version").fetchone()
            database.execute("BEGIN IMMEDIATE")
            # Only a write shows that the file is read-only. It changes nothing.
            database.execute(f"PRAGMA user_version = {int(version)}")
            database.rollback()
    except sqlite3.Error as error:
        if "locked" in str(error):
            return  # somebody writes: it can be written
        raise StoreError(
            f"{path}: not a database that can be opened: {error}.",
            "Check the file's permissions and the space left; a damaged file: move it away and run the study again, "
            "which writes its runs anew from the study storage.",
        ) from None


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Keep Python's warnings, and these loggers below errors, from the terminal, where a live display may be."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def local_path(uri: str) -> Path | None:
    """The path of a file: URI or of a plain path; None for what lies elsewhere."""
    load_mlflow()
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

    return Path(local_file_uri_to_path(uri)) if is_local_uri(uri) else None
