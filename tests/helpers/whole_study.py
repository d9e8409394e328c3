"""Everything that the stores hold of a study as plain data without ids, read past the platform's own code."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import optuna
import yaml

from hpo.home import Home
from hpo.records import StudyResult
from hpo.tracking.champions import champions
from hpo.tracking.ledger import openings
from hpo.tracking.store import connect

_IDS = ("model_id", "model_uuid", "run_id")
_MOVED = ("hpo.moved", "hpo.moved_from", "hpo.registered", "mlflow.modelVersions")


def whole(home: Home, study: StudyResult) -> dict[str, Any]:
    """Trials, runs, models, versions and openings; equal for a study and its copy."""
    return {"optuna": searched(home, study.title), **tracked(home, study.name), "openings": openings(home, study)}


def searched(home: Home, title: str) -> dict[str, Any]:
    """What Optuna has."""
    storage = optuna.storages.RDBStorage(home.storage_url)
    found = optuna.load_study(study_name=title, storage=storage)
    trials = [
        {
            "number": one.number,
            "state": one.state,
            "values": one.values,
            "times": (one.datetime_start, one.datetime_complete),
            "params": sorted(one.params.items()),
            "distributions": sorted(one.distributions.items()),
            "steps": sorted(one.intermediate_values.items()),
            "constraints": one.constraints,
            # A server gives them in any order.
            "attributes": [sorted(each.items()) for each in (_homeless(one.user_attrs), one.system_attrs)],
        }
        for one in found.get_trials(deepcopy=False)
    ]
    names = [each.study_name for each in storage.get_all_studies()]
    storage.scoped_session.remove()
    storage.engine.dispose()
    return {"directions": found.directions, "attributes": found.user_attrs, "trials": repr(trials), "names": names}


def _homeless(attributes: dict[str, Any]) -> dict[str, Any]:
    result = attributes.get("hpo.result")
    return {**attributes, **({"hpo.result": {**result, "folder": ""}} if result else {})}


def tracked(home: Home, name: str) -> dict[str, Any]:
    """What MLflow has in the experiment and the registered model of this name."""
    client = connect(home)
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return {"runs": [], "models": [], "versions": [], "registered": {}}
    runs = client.search_runs([experiment.experiment_id], run_view_type=3, max_results=5000)
    models = client.search_logged_models([experiment.experiment_id], max_results=100)
    names = {run.info.run_id: run.info.run_name for run in runs}
    names |= {model.model_id: f"model of {names.get(model.source_run_id)}" for model in models}
    places = {model.artifact_location: names[model.model_id] for model in models}
    versions = client.search_model_versions(f"name = '{name}'")
    registered = client.get_registered_model(name) if versions else None
    return {
        "runs": sorted((_run(client, run, names) for run in runs), key=lambda run: (run["name"], run["started"])),
        "models": sorted((_model(home, client, model, names) for model in models), key=lambda model: model["run"]),
        "versions": sorted(
            (int(one.version), _ours(one.tags), one.description or None, names.get(one.run_id), places[one.source])
            for one in versions
        ),
        "registered": {
            "tags": registered.tags,
            "aliases": {alias: int(number) for alias, number in registered.aliases.items()},
            "description": registered.description or "",
            "champions": champions(home, name),
        }
        if registered
        else {},
    }


def _ours(tags: dict[str, str]) -> dict[str, str]:
    return {name: text for name, text in tags.items() if name not in _MOVED}


def _run(client: Any, run: Any, names: dict[str, str]) -> dict[str, Any]:
    tags = {key: names.get(text.removeprefix("models:/"), text) for key, text in _ours(run.data.tags).items()}
    points = [
        (point.key, repr(point.value), point.timestamp, point.step)
        for key in run.data.metrics
        for point in client.get_metric_history(run.info.run_id, key)
    ]
    return {
        "name": run.info.run_name,
        "status": run.info.status,
        "stage": run.info.lifecycle_stage,
        "started": run.info.start_time,
        "ended": run.info.end_time,
        "tags": tags,
        "params": run.data.params,
        "points": sorted(points),
        "latest": {key: repr(value) for key, value in run.data.metrics.items()},
        "datasets": sorted(
            (repr(one.dataset.to_dictionary()), repr([(tag.key, tag.value) for tag in one.tags]))
            for one in run.inputs.dataset_inputs
        ),
        "outputs": sorted((names[one.model_id], one.step) for one in run.outputs.model_outputs),
        "files": _files(client, run.info.artifact_uri),
    }


def _model(home: Home, client: Any, model: Any, names: dict[str, str]) -> dict[str, Any]:
    return {
        "name": model.name,
        "status": str(model.status),
        "kind": model.model_type,
        "run": names.get(model.source_run_id, ""),
        "tags": _ours(model.tags),
        "params": model.params,
        "metrics": sorted((one.key, one.value, one.timestamp, one.step) for one in model.metrics or ()),
        "files": _files(client, model.artifact_location),
    }


def _files(client: Any, place: str) -> dict[str, Any]:
    """Path -> digest; of MLmodel what it says, without the ids in it."""
    from mlflow.artifacts import download_artifacts, list_artifacts

    if not list_artifacts(artifact_uri=place, tracking_uri=client.tracking_uri):
        return {}  # which MLflow takes for a mistake
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(download_artifacts(artifact_uri=place, dst_path=scratch, tracking_uri=client.tracking_uri))
        files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
        return {
            name: _said(path) if name == "MLmodel" else hashlib.sha256(path.read_bytes()).hexdigest()
            for name, path in files.items()
        }


def _said(path: Path) -> str:
    facts = yaml.safe_load(path.read_text(encoding="utf-8"))
    return json.dumps({key: value for key, value in facts.items() if key not in _IDS}, sort_keys=True, default=str)
