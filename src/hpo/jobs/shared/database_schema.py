"""Which schema a database has, and which one the installed packages want; no store's library is loaded for it."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from hpo.database import reading

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
