"""Repairs of the tracking store that lose no result, and the deletion of what its user has deleted there."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from hpo.home import Home
from hpo.locks import locked
from hpo.tracking import models, runs
from hpo.tracking.reader import Experiment, Model, Run
from hpo.tracking.store import connect, load_mlflow, translate_errors

ORPHAN = "hpo.orphan"  # the tag of a run that no trial of the study storage answers for
# Where MLflow's database holds absolute places.
_LOCATIONS = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}


@translate_errors
def end_runs(home: Home, run_ids: Sequence[str], *, tags: Mapping[str, str] | None = None) -> None:
    """Close those of the runs that are still RUNNING, as KILLED, and give all of them these tags."""
    client = connect(home)
    for run_id in run_ids:
        for name, value in (tags or {}).items():
            client.set_tag(run_id, name, value)
        if client.get_run(run_id).info.status == "RUNNING":
            client.set_terminated(run_id, "KILLED")


@translate_errors
def forget_model(home: Home, run: Run) -> None:
    """Take back what a run says of a model whose files are gone."""
    client = connect(home)
    models.delete_model(client, run.tags[runs.MODEL].removeprefix("models:/"))
    client.delete_tag(run.id, runs.MODEL)


@translate_errors
def restore_files(home: Home, run_id: str, files: Mapping[str, Any]) -> None:
    """Write files of a run again; see runs.trial_files."""
    runs.log_files(connect(home), run_id, files)


@translate_errors
def move_artifacts(home: Home, old: Path, new: Path) -> Path:
    """Have every place under the folder old point to the same one under new; returns the copy of the database before.

    For the embedded database only, and while nobody writes it.
    """
    file = home.root / "mlflow.db"
    copy = file.with_name(f"mlflow.db.before-move-{time.strftime('%Y%m%d-%H%M%S')}")
    with locked(home.locks / "mlflow-create.lock"), closing(sqlite3.connect(file, timeout=60)) as database:
        with closing(sqlite3.connect(copy)) as target:
            database.backup(target)
        with database:
            for table, columns in _LOCATIONS.items():
                for column in columns:
                    for before, after in ((old.as_uri(), new.as_uri()), (str(old), str(new))):
                        # Names of this table only; substr, because a folder may have % or _ in its name.
                        database.execute(
                            f"UPDATE {table} SET {column} = ? || substr({column}, ?) "  # noqa: S608
                            f"WHERE substr({column}, 1, ?) = ?",
                            (f"{after}/", len(before) + 2, len(before) + 1, f"{before}/"),
                        )
    load_mlflow()
    from mlflow.tracking._tracking_service import utils

    utils._artifact_repos_cache.clear()  # in which this process has the old places
    return copy


@translate_errors
def purge(home: Home, dead: Sequence[Run | Model | Experiment]) -> None:
    """Delete for good, files first, what is deleted in MLflow already; as `mlflow gc`, but only these."""
    client = connect(home)
    store = client._tracking_client.store
    order = {Model: store._hard_delete_logged_model, Run: store._hard_delete_run}
    for kind, delete in order.items():
        for one in dead:
            if isinstance(one, kind):
                models.delete_artifacts(client, one.location)
                delete(one.id)
    for one in dead:
        if isinstance(one, Experiment):
            store._hard_delete_experiment(one.id)
