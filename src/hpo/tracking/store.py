"""Access to MLflow: imported when first used, with telemetry off, its errors turned into StoreError."""

from __future__ import annotations

import errno
import functools
import logging
import os
import re
import shutil
import socket
import sqlite3
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from urllib.parse import urlsplit

from hpo.database import is_damaged, sqlite_address
from hpo.errors import HpoError, StoreAwayError, StoreError, disk_full, shown_address
from hpo.home import Home, cache_folder
from hpo.locks import lock, locked
from hpo.relocation import local_path, readable_copy, relocate

P = ParamSpec("P")
R = TypeVar("R")

# MLflow reads these when it is imported or called. Values that the user has set are kept.
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # MLflow would retry for minutes, and a request that it repeats blindly can be stored twice. Our retries look first.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # seconds
    "MLFLOW_LOG_UV_FILES": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # standard output belongs to the command
    "MLFLOW_UV_AUTO_DETECT": "false",  # else the working directory's lock file becomes the model's requirements
}
_HINT = "Check that the folder can be written and has space left, or that the server of MLFLOW_TRACKING_URI is up."
_DAMAGED = (
    "A damaged file: restore it from a copy, or move it elsewhere and run the study again, which writes its runs again "
    "from the study storage; of models, those that still wait in mlruns/work."
)
# MLflow's codes for a busy or missing database, and the system's for a disk or a server that is unavailable.
_BUSY = ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
_UNAVAILABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTUNREACH)
# The part of a long message that names the cause.
_CAUSE = re.compile(r"\[Errno -?\d+\] [^'\")]+|too many \d+ error responses|[Rr]ead timed out|Remote end closed \w+")


def load_mlflow() -> Any:
    """The module mlflow; the first call takes seconds."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow

    # It logs a traceback for every database error that it also raises.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    return mlflow


def is_server(uri: str) -> bool:
    """True for the address of an MLflow server, False for a database."""
    return uri.startswith(("http://", "https://"))


def exists(home: Home) -> bool:
    """False while the embedded database has not been created yet; readers check this, for connect() creates it."""
    return not home.embedded or (home.root / "mlflow.db").is_file()


def check_reachable(home: Home) -> None:
    """Check within milliseconds that the tracking store answers and can be written. Raises StoreError."""
    if is_server(home.tracking_uri):
        _check_server(home.tracking_uri)
    elif home.embedded and exists(home):
        _check_file(home.root / "mlflow.db")


@functools.lru_cache
def connect(home: Home) -> Any:
    """The MlflowClient of a home; a database that does not exist yet is created. Raises StoreError."""
    with _errors_translated(home):
        if is_server(home.tracking_uri):
            _check_server(home.tracking_uri)
            return load_mlflow().MlflowClient(home.tracking_uri, home.tracking_uri)
        if home.embedded and (copy := readable_copy(home, "mlflow.db")) is not None:
            return _connect_to_copy(home, copy)
        database_address(home)
        # MLflow's first migrations race where several processes open a new database.
        with _creation_lock(home), quiet("alembic"):
            if home.embedded:
                if not exists(home):
                    _create_file(home.root / "mlflow.db")
                _check_file(home.root / "mlflow.db")
            client = load_mlflow().MlflowClient(home.tracking_uri, home.tracking_uri)
            client.search_registered_models(max_results=1)  # the registry's store opens at its first use
        if home.embedded:
            _write_ahead(home.root / "mlflow.db", client._tracking_client.store.engine)
            _remove_stray_folder(home)
            _guard(home, client)
        return client


@contextmanager
def passing_over(error_code: str) -> Iterator[None]:
    """Pass over MLflow's refusal to make or restore what another process has made or restored a moment ago."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != error_code:
            raise


def database_address(home: Home) -> str:
    """The address of a tracking database in which places are named where they are now, after a move of the home.

    Where the home cannot be written it is that of a copy. Raises StoreError.
    """
    if home.embedded and (copy := readable_copy(home, "mlflow.db")) is not None:
        return sqlite_address(copy)
    if moved := relocate(home):
        logging.getLogger("hpo").warning(moved)
    return home.tracking_uri


def _connect_to_copy(home: Home, copy: Path) -> Any:
    """The client of a copy of a database that cannot be written; what would change the copy is refused."""
    from sqlalchemy import event

    uri = sqlite_address(copy)
    with quiet("alembic"):
        client = load_mlflow().MlflowClient(uri, uri)
        client.search_registered_models(max_results=1)
    for store in (client._tracking_client.store, client._get_registry_client().store):
        event.listen(store.engine, "connect", lambda connection, _: connection.execute("PRAGMA query_only=ON"))
        store.engine.dispose()
    _guard(home, client)
    return client


def _guard(home: Home, client: Any) -> None:
    """Let the client refuse every artifact of a run or model that lies outside the home; see check_inside."""
    from mlflow.tracking._tracking_service import utils

    find = client._tracking_client._get_artifact_repo

    def find_inside(owner: str, /, **kind: Any) -> Any:
        try:
            found = find(owner, **kind)
            check_inside(client, found.artifact_uri)
        except StoreError:
            # MLflow keeps addresses by the id of their run, which is the same in the original and in a copy.
            utils._artifact_repos_cache.pop(owner, None)
            found = find(owner, **kind)
            check_inside(client, found.artifact_uri)
        return found

    client.hpo_home = home
    client._tracking_client._get_artifact_repo = find_inside


def check_inside(client: Any, uri: str) -> None:
    """Raise StoreError if the address names local files outside the home of an embedded store's client."""
    path, home = local_path(uri), getattr(client, "hpo_home", None)
    if path is not None and home is not None:
        home.check_inside(path)


def pages(search: Callable[..., Any], **arguments: Any) -> Iterator[Any]:
    """All results of one of the client's search methods, page by page."""
    token = None
    while True:
        page = search(**arguments, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _remove_stray_folder(home: Home) -> None:
    """Remove the empty folder that MLflow makes where a path is quoted in its address: it takes that for the path."""
    folder = Path(home.tracking_uri.removeprefix("sqlite:///")).parent
    with suppress(OSError):
        if folder != home.root:
            folder.rmdir()
            folder.parent.rmdir()


def server_version(home: Home) -> str:
    """The version of the MLflow server. Raises StoreError where it does not answer or is something else."""
    import requests

    _check_server(home.tracking_uri)
    with _errors_translated(home):
        answer = requests.get(f"{home.tracking_uri.rstrip('/')}/version", timeout=10)
        answer.raise_for_status()
    return answer.text.strip()


def upgrade_tracking(home: Home) -> None:
    """Migrate the tables of an older MLflow to the installed version. Raises StoreError."""
    with _errors_translated(home), _creation_lock(home), quiet("alembic"):
        load_mlflow()
        from mlflow.store.db.utils import _upgrade_db, create_sqlalchemy_engine

        engine = create_sqlalchemy_engine(home.tracking_uri)
        _upgrade_db(engine)
        engine.dispose()


def _creation_lock(home: Home) -> AbstractContextManager[None]:
    """The lock for creating or upgrading the tracking database.

    The embedded file belongs to this folder, so its lock is a local file and works while the study server is down. A
    database on a server may be created from several machines: its lock is the one that they share.
    """
    home.create()
    return locked(home.locks / "mlflow-create.lock") if home.embedded else lock(home, "mlflow-create")


def _create_file(path: Path) -> None:
    """Create a database with all its tables, or none: nobody can open what a kill in the migrations leaves.

    MLflow's migrations take seconds: their result is kept in the cache, once for each version, and copied.
    """
    version = load_mlflow().__version__
    template = cache_folder() / f"mlflow-{version}.db"
    part = path.with_name(f"{path.name}.part")
    for leftover in path.parent.glob(f"{part.name}*"):
        leftover.unlink()
    if not _is_whole(template):
        _migrate_new(part)
        with suppress(OSError):  # a cache that cannot be written costs seconds the next time
            template.parent.mkdir(parents=True, exist_ok=True)
            own = template.with_name(f"{template.name}.{os.getpid()}.part")
            shutil.copyfile(part, own)
            own.replace(template)
    else:
        shutil.copyfile(template, part)
    part.replace(path)


def _is_whole(template: Path) -> bool:
    if not template.is_file():
        return False
    try:
        with closing(sqlite3.connect(template)) as database:
            (found,) = database.execute("PRAGMA quick_check").fetchone()
            return found == "ok" and database.execute("SELECT 1 FROM alembic_version").fetchone() is not None
    except sqlite3.Error:
        return False


def _migrate_new(path: Path) -> None:
    from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine

    engine = create_sqlalchemy_engine(sqlite_address(path))
    _initialize_tables(engine)
    engine.dispose()


def _write_ahead(path: Path, engine: Any) -> None:
    """Let no commit wait for the disk, which takes half of the time of logging a trial; the study storage does too.

    A kill loses nothing. A power cut may lose the last seconds, which the next run of the study writes again.
    """
    from sqlalchemy import event

    with closing(sqlite3.connect(path)) as database, suppress(sqlite3.OperationalError):  # busy: another sets it
        database.execute("PRAGMA journal_mode=WAL")
    event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=NORMAL"))
    engine.dispose()


def translate_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Turn errors of MLflow, its database and the disk into StoreError; the first argument is a Home or has one."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0] if args else kwargs["home"]
        with _errors_translated(first if isinstance(first, Home) else first.home):
            return function(*args, **kwargs)

    return call


@contextmanager
def _errors_translated(home: Home) -> Iterator[None]:
    try:
        yield
    except HpoError:
        raise
    except Exception as error:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        if not isinstance(error, MlflowException | SQLAlchemyError | OSError):
            raise
        kind = StoreAwayError if _is_temporary(error) else StoreError
        hint = "Free some space on its disk." if disk_full(error) else _DAMAGED if is_damaged(str(error)) else _HINT
        raise kind(f"MLflow at {shown_address(home.tracking_uri)}: {_message(error)}.", hint) from error


def _is_temporary(error: Exception) -> bool:
    """True where the same call may work later: no answer, a busy database, a full disk."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import ConnectionError as Unreachable
    from requests.exceptions import Timeout
    from sqlalchemy.exc import InterfaceError, OperationalError

    if isinstance(error, MlflowException):
        # MLflow's message for a request without an answer, or with a status of a server in trouble (408, 429, 5xx).
        unanswered = re.match(r"API request to \S+ failed with (timeout )?exception", str(error))
        return bool(unanswered) or error.error_code in _BUSY or disk_full(error)
    if isinstance(error, OSError):
        response = getattr(error, "response", None)  # an HTTP status that requests raises as an error
        if response is not None:
            return bool(response.status_code >= 500 or response.status_code in (408, 429))
        return isinstance(error, ConnectionError | TimeoutError | Unreachable | Timeout) or error.errno in _UNAVAILABLE
    return isinstance(error, OperationalError | InterfaceError)


def is_missing(error: Exception) -> bool:
    """True for MLflow's error that a run, model or version does not exist."""
    return getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST"


def _message(error: Exception) -> str:
    text = str(error)
    cause = _CAUSE.search(text) if "API request to" in text else None
    first_line = (text.splitlines() or [type(error).__name__])[0]
    return cause[0] if cause else first_line.removeprefix("(sqlite3.OperationalError) ").rstrip(".")


def _check_server(uri: str) -> None:
    # MLflow itself would retry for minutes before it reports an error.
    parts = urlsplit(uri)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=10).close()
    except OSError as error:
        raise StoreAwayError(
            f"MLFLOW_TRACKING_URI={shown_address(uri)}: nothing answers there: {error.strerror or error}.",
            "Start the server, correct the address, or unset MLFLOW_TRACKING_URI to use mlruns/mlflow.db.",
        ) from None


def _check_file(path: Path) -> None:
    # As with servers: MLflow would retry for minutes.
    try:
        with closing(sqlite3.connect(path)) as database:
            (version,) = database.execute("PRAGMA user_version").fetchone()
            database.execute("BEGIN IMMEDIATE")
            # Only a write reveals a read-only file. It changes nothing.
            database.execute(f"PRAGMA user_version = {int(version)}")
            database.rollback()
    except sqlite3.Error as error:
        if "locked" in str(error):
            return  # another process writes it, so it can be written
        raise StoreError(
            f"{path}: not a database that can be opened: {error}.",
            _DAMAGED if is_damaged(str(error)) else "Check the file's permissions and the space left.",
        ) from None


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Keep Python's warnings, and messages of these loggers below errors, off the terminal and its live display."""
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
