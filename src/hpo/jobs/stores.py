"""The two stores of a project: whether they answer, and how one of an older version is brought up to date."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from hpo.database import reading, sqlite_file
from hpo.errors import HpoError, StoreError, shown_address
from hpo.home import Home
from hpo.storage.liveness import holders
from hpo.storage.reader import count_trials
from hpo.tracking.store import is_server, server_version

_REVISION = re.compile(r"^(revision|down_revision)\s*(?::[^=]*)?=\s*[\"']([^\"']+)[\"']", re.MULTILINE)
# Package -> where its migrations lie.
_MIGRATIONS = {"optuna": "storages/_rdb/alembic/versions", "mlflow": "store/db_migrations/versions"}


@dataclass(frozen=True)
class Schema:
    """version is the database's, "" for one that is empty or not there; newest is the installed package's."""

    version: str
    newest: str
    older: bool = False

    @property
    def current(self) -> bool:
        """Whether the installed package takes it as it is."""
        return self.version == self.newest

    @property
    def is_new(self) -> bool:
        """Whether there is nothing in it yet."""
        return not self.version


@dataclass(frozen=True)
class StoreState:
    """A store. name is studies or tracking; address has no password; state is ok, new, older, newer or away.

    detail says what is in it, or why it is unavailable; next is the next step for the user, "" if there is none.
    """

    name: str
    address: str
    state: str
    detail: str
    next: str = ""
    milliseconds: float = 0.0

    @property
    def well(self) -> bool:
        """Whether a run can use it."""
        return self.state in ("ok", "new")


def store_status(home: str | Path | None = None) -> list[StoreState]:
    """The state of the study storage and of MLflow; nothing is made or changed. Raises StoreError for hpo.toml only."""
    place = Home.find(home)
    return [_state("studies", "optuna", place), _state("tracking", "mlflow", place)]


def _state(name: str, package: str, home: Home) -> StoreState:
    url = home.storage_url if package == "optuna" else home.tracking_uri
    address = str(sqlite_file(url) or shown_address(url))
    began = time.perf_counter()
    try:
        if is_server(url):
            detail, state, step = f"server, MLflow {server_version(home)}", "ok", ""
        else:
            schema = read_schema(package, url)
            state, step = _judge(schema, package)
            words = count_trials(home) if package == "optuna" and state == "ok" else ""
            detail = words or (f"schema {schema.version}, installed {schema.newest}" if schema.version else "empty")
    except StoreError as error:
        return StoreState(name, address, "away", error.message, error.hint)
    return StoreState(name, address, state, detail, step, 1000 * (time.perf_counter() - began))


def _judge(schema: Schema, package: str) -> tuple[str, str]:
    if schema.current:
        return "ok", ""
    if schema.is_new:
        return "new", ""
    return ("older", "hpo store upgrade") if schema.older else ("newer", f"Install a newer {package}.")


def upgrade_stores(home: str | Path | None = None, *, backed_up: bool = False) -> list[str]:
    """Bring databases of older versions up to date; one sentence for each that was.

    A SQLite file is copied first, next to it. Of a database on a server there must be a copy (backed_up=True): its
    migrations cannot be undone. Raises StoreError where one is newer than what is installed, where one cannot be read,
    or while a run of this machine has a study open: those of others are not seen, and must have ended.
    """
    place = Home.find(home)
    at_work = holders(place.locks)
    if at_work:
        raise StoreError(f"{at_work[0].title}: process {at_work[0].pid} has it open.", "End all runs first: hpo stop")
    done = []
    for package, url in (("optuna", place.storage_url), ("mlflow", place.tracking_uri)):
        if is_server(url):
            continue  # its own machine upgrades it: mlflow db upgrade
        schema, file = read_schema(package, url), sqlite_file(url)
        if schema.current or schema.is_new:
            continue
        if not schema.older:
            raise StoreError(
                f"{file or shown_address(url)}: schema {schema.version} is newer than {schema.newest}.",
                f"Install a newer {package}.",
            )
        if file is None and not backed_up:
            raise StoreError(
                f"{shown_address(url)}: schema {schema.version} would become {schema.newest}, which cannot be undone.",
                "Copy it (pg_dump), then: hpo store upgrade --yes",
            )
        kept = f"; the file as it was: {_copy(file, schema.version)}" if file is not None else ""
        _upgrade(package, place)
        done.append(f"{file or shown_address(url)}: schema {schema.version} is now {schema.newest}{kept}")
    return done


def _copy(file: Path, version: str) -> Path:
    copy = file.with_name(f"{file.name}.{version}")
    if shutil.disk_usage(file.parent).free < 2 * file.stat().st_size:
        raise HpoError(f"{file.parent}: no space for a copy of {file.name}.", "Free some space, then try again.")
    with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    return copy


def _upgrade(package: str, home: Home) -> None:
    # Here, because they load Optuna and MLflow, and there is hardly ever something to bring up to date.
    from hpo.storage.optuna_storage import upgrade_storage
    from hpo.tracking.store import upgrade_tracking

    (upgrade_storage if package == "optuna" else upgrade_tracking)(home)


def read_schema(package: str, url: str) -> Schema:
    """The schema of the database of optuna or mlflow at this address. Raises StoreError where it cannot be read."""
    with reading(url) as reader:
        version = reader.schema() if reader is not None else ""
    known, newest = _revisions(package)
    return Schema(version, newest, older=version in known and version != newest)


def _revisions(package: str) -> tuple[set[str], str]:
    """(every schema that the installed package knows, the newest), from its migrations, none of which is run."""
    found = importlib.util.find_spec(package)
    known: set[str] = set()
    replaced: set[str] = set()
    folders = [Path(place, _MIGRATIONS[package]) for place in (found.submodule_search_locations or () if found else ())]
    for file in (file for folder in folders for file in folder.glob("*.py")):
        for kind, revision in _REVISION.findall(file.read_text(encoding="utf-8")):
            (known if kind == "revision" else replaced).add(revision)
    (newest,) = known - replaced
    return known, newest
