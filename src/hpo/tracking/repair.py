"""Repairs of the tracking store that lose no result, and the deletion of what its user has deleted there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hpo.home import Home
from hpo.tracking import models, runs
from hpo.tracking.reader import Experiment, Model, Run
from hpo.tracking.store import connect, translate_errors

ORPHAN = "hpo.orphan"  # the tag of a run that no trial of the study storage answers for


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
