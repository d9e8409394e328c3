"""Follow a project that was moved or copied: the identity of its folder, and the addresses in its databases."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Collection
from contextlib import closing
from pathlib import Path, PurePath
from urllib.parse import quote, unquote, urlsplit

from hpo.database import open_read_only
from hpo.errors import StoreError
from hpo.home import Home, plain_file
from hpo.locks import locked, seen_held

# {"id": random, "path": where this mlruns folder was last used}. A copy has the id of its original, at another path.
IDENTITY = "home.json"
# Where MLflow's database holds absolute addresses.
_LOCATIONS = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}


def local_path(uri: str) -> Path | None:
    """The path of a file: URI or of a plain path; None for any other address."""
    parts = urlsplit(uri)
    if parts.scheme not in ("", "file") or parts.netloc not in ("", "localhost"):
        return None
    return Path(unquote(parts.path)) if parts.scheme else Path(uri)


def earlier_roots(home: Home) -> list[Path]:
    """The other `mlruns` folders that this one says it is: by its identity, and by MLflow's database. Read-only."""
    roots = _roots_of_experiments(home)
    if path := _identity(home.root).get("path"):
        roots.add(Path(path))
    return sorted(root for root in roots if root != home.root and not _is_same(root, home.root))


def relocate(home: Home) -> str:
    """Have a moved or copied home name its own files only; returns one line for the user, "" if nothing was to be done.

    The databases in the folder are corrected; those on servers are left alone. A copy, whose original still exists,
    gets an id of its own. Nothing is done where the folder cannot be written, and while a run uses it under its other
    path, as from inside a container. Raises StoreError.
    """
    if not home.root.is_dir() or not os.access(home.root, os.W_OK):
        return ""
    if _identity(home.root) and not earlier_roots(home):
        return ""
    home.create()
    try:
        with locked(home.locks / "relocate.lock"):
            return _relocate(home)
    except (OSError, sqlite3.Error) as error:
        raise StoreError(
            f"{home.root}: the addresses in its databases cannot be corrected after a move: {error}.",
            "Mend that, then see: hpo doctor",
        ) from None


def _relocate(home: Home) -> str:
    identity, roots = _identity(home.root), earlier_roots(home)
    if roots and any(seen_held(path) for path in home.locks.glob("lease-*.lock")):
        return ""
    originals = [root for root in roots if _is_original(root, identity)]
    if originals or not identity:
        if originals:
            (home.locks / "id").unlink(missing_ok=True)  # by which runs on a shared storage tell lock folders apart
        identity = {"id": uuid.uuid4().hex}
    if roots:
        _correct_tracking(home, roots)
    _correct_storage(home)
    # The identity last: cut short, all of it is done again.
    part = home.root / f"{IDENTITY}.part"
    part.write_text(json.dumps({**identity, "path": str(home.root)}), encoding="utf-8")
    part.replace(home.root / IDENTITY)
    if originals:
        return f"{home.root} is a copy of {originals[0]}: from now on it names its own files only."
    return f"{roots[0]} was moved to {home.root}: the addresses in its databases were corrected." if roots else ""


def _identity(root: Path) -> dict[str, str]:
    """The content of the identity file; {} where there is none that can be read."""
    try:
        found = json.loads(plain_file(root / IDENTITY).read_text(encoding="utf-8"))
        identity = {"id": str(found["id"]), "path": str(found["path"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return identity if Path(identity["path"]).is_absolute() else {}


def _is_original(root: Path, identity: dict[str, str]) -> bool:
    """True if the folder that this one was copied from is still there."""
    if not identity:  # of a version that kept none
        return (root / "mlflow.db").is_file() or (root / "optuna.db").is_file()
    there = _identity(root)
    return there.get("id") == identity["id"] or (not there and (root / "mlflow.db").is_file())


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _roots_of_experiments(home: Home) -> set[Path]:
    """The `mlruns` folders that MLflow's embedded database names as places of hpo's experiments."""
    file = home.root / "mlflow.db"
    if not home.embedded or not file.is_file():
        return set()
    try:
        with closing(open_read_only(file)) as database:
            found = database.execute("SELECT name, artifact_location FROM experiments").fetchall()
    except sqlite3.Error:  # damaged, or being created: connect() and the doctor have the message
        return set()
    paths = [local_path(at) for name, at in found if at and at.endswith(f"/artifacts/{quote(name)}")]
    return {path.parents[1] for path in paths if path is not None}


def _correct_tracking(home: Home, roots: Collection[Path]) -> None:
    """Point every address below one of the roots to the same one below this home; the database is copied first."""
    file = home.root / "mlflow.db"
    if not home.embedded or not file.is_file():
        return
    for earlier in home.root.glob("mlflow.db.before-move-*"):
        earlier.unlink()
    copy = file.with_name(f"mlflow.db.before-move-{time.strftime('%Y%m%d-%H%M%S')}")
    with closing(sqlite3.connect(file, timeout=60)) as database:
        with closing(sqlite3.connect(copy)) as target:
            database.backup(target)
        _point_below(home.root, database, roots)


def _point_below(own: Path, database: sqlite3.Connection, roots: Collection[Path]) -> None:
    changes = [
        (table, column, before, after)
        for table, columns in _LOCATIONS.items()
        for column in columns
        for root in roots
        for before, after in ((root.as_uri(), own.as_uri()), (str(root), str(own)))
    ]
    with database:
        for table, column, before, after in changes:
            # Names of this table only; substr, because a folder may have % or _ in its name.
            database.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) "  # noqa: S608
                f"WHERE substr({column}, 1, ?) = ?",
                (f"{after}/", len(before) + 2, len(before) + 1, f"{before}/"),
            )


@functools.cache
def readable_copy(home: Home, name: str) -> Path | None:
    """A copy of one of the home's databases in a temporary folder, where the home cannot be written; else None.

    The libraries of the stores write when they open a database. Addresses in the copy are of the place where the home
    is now. It is removed when this process ends.
    """
    file = home.root / name
    if not file.is_file() or all(os.access(path, os.W_OK) for path in (home.root, file)):
        return None
    folder = Path(tempfile.mkdtemp(prefix="hpo-reading-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with closing(open_read_only(file)) as database, closing(sqlite3.connect(folder / name)) as copy:
        database.backup(copy)
        if name == "mlflow.db":
            _point_below(home.root, copy, earlier_roots(home))
    return folder / name


def _correct_storage(home: Home) -> None:
    """Keep of the folders in stored results only the name: versions until now stored them with their absolute path."""
    file = home.root / "optuna.db"
    if home.shared or not file.is_file():
        return
    with closing(sqlite3.connect(file, timeout=60)) as database, database:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'trial_user_attributes'").fetchall():
            return
        rows = database.execute(
            "SELECT trial_user_attribute_id, value_json FROM trial_user_attributes "
            """WHERE key = 'hpo.result' AND value_json LIKE '%"folder": "/%'"""
        ).fetchall()
        for number, text in rows:
            result = json.loads(text)
            result["folder"] = PurePath(result["folder"]).name
            database.execute(
                "UPDATE trial_user_attributes SET value_json = ? WHERE trial_user_attribute_id = ?",
                (json.dumps(result), number),
            )
