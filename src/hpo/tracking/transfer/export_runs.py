"""Export what the tracking store holds of a study as JSON types and files.

Runs and logged models are named by their original ids. A copy carries its original id as a tag, so an import finds what
was copied before, also in the store that it came from.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpo.home import Home
from hpo.records import StudyResult
from hpo.relocation import local_path
from hpo.tracking import runs
from hpo.tracking.ledger import Opening, openings
from hpo.tracking.registry import COPY_OF, REGISTERED
from hpo.tracking.store import connect, exists, is_missing, pages, translate_errors

COPIED = "hpo.moved"  # tag of a completely copied run: the digest of its content
URI = "models:/"
_LOCAL_TAGS = (COPY_OF, COPIED, "mlflow.modelVersions")  # tags of one store only; a server writes the last

AddFile = Callable[[str, Path], None]


@dataclass
class TrackedStudy:
    """The content of MLflow for a study, as JSON types.

    runs have every point of their metrics as [name, value, time in ms, step]; the study's own run is first. registered
    is the registered model of the study's name with all its versions, also those of other generations, or None.
    openings are those of the sealed test part.
    """

    runs: list[dict[str, Any]] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)
    registered: dict[str, Any] | None = None
    openings: list[Opening] = field(default_factory=list)


@translate_errors
def export_runs(home: Home, study: StudyResult, add_file: AddFile) -> TrackedStudy:
    """The content of the store for a study; add_file("runs/ID/PATH" or "models/ID/PATH", file) gets each of its files.

    A store without a run of the study gives only the ledger's openings. Deleted runs and models are left out. Raises
    StoreError.
    """
    tracked = TrackedStudy(openings=openings(home, study))
    if not exists(home):
        return tracked
    client = connect(home)
    parent = runs.find_parent(client, study)
    versions = sorted(
        pages(client.search_model_versions, filter_string=f"name = '{study.name}'"), key=lambda one: int(one.version)
    )
    found = {run.info.run_id: run for run in ([parent, *runs.children(client, parent)] if parent else [])}
    for run_id in {version.run_id for version in versions if version.run_id} - found.keys():
        run = _active_run(client, run_id)
        found |= {run_id: run} if run is not None else {}
    originals = _OriginalIds(client)
    experiment = client.get_experiment_by_name(study.name)
    places = {version.source for version in versions}  # a search does not give their model_id
    models = [
        model
        for model in (logged_models(client, experiment.experiment_id) if experiment is not None else ())
        if str(model.status) == "READY" and (model.artifact_location in places or model.source_run_id in found)
    ]
    originals.models |= {model.model_id: model.tags.get(COPY_OF, model.model_id) for model in models}
    originals.runs |= {run_id: run.data.tags.get(COPY_OF, run_id) for run_id, run in found.items()}
    for run in sorted(found.values(), key=lambda run: (runs.PARENT in run.data.tags, run.info.start_time)):
        tracked.runs.append(_plain_run(client, run, originals))
        _add_files(client, run.info.artifact_uri, f"runs/{originals.runs[run.info.run_id]}", add_file)
    for model in models:
        tracked.models.append(_plain_model(model, originals))
        _add_files(client, model.artifact_location, f"models/{originals.models[model.model_id]}", add_file)
    if versions:
        at = {model.artifact_location: originals.models[model.model_id] for model in models}
        tracked.registered = _plain_registered(client.get_registered_model(study.name), versions, originals, at)
    return tracked


class _OriginalIds:
    """Original ids of runs and models, which differ from their ids here where they are copies."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.runs: dict[str, str] = {}
        self.models: dict[str, str] = {}

    def run(self, run_id: str) -> str:
        if run_id not in self.runs:
            run = _active_run(self._client, run_id)
            self.runs[run_id] = run.data.tags.get(COPY_OF, run_id) if run is not None else run_id
        return self.runs[run_id]

    def model(self, model_id: str) -> str:
        return self.models.get(model_id, model_id)


def logged_models(client: Any, experiment: str) -> Iterator[Any]:
    """The logged models of an experiment, finished or not."""
    yield from pages(client.search_logged_models, experiment_ids=[experiment], max_results=100)


def _active_run(client: Any, run_id: str) -> Any | None:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if not is_missing(error):
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _plain_run(client: Any, run: Any, originals: _OriginalIds) -> dict[str, Any]:
    tags = {name: value for name, value in run.data.tags.items() if name not in _LOCAL_TAGS}
    if runs.PARENT in tags:
        tags[runs.PARENT] = originals.run(tags[runs.PARENT])
    if runs.MODEL in tags:
        tags[runs.MODEL] = URI + originals.model(tags[runs.MODEL].removeprefix(URI))
    points = [
        [point.key, point.value, point.timestamp, point.step]
        for name in sorted(run.data.metrics)
        for point in client.get_metric_history(run.info.run_id, name)
    ]
    outputs = run.outputs.model_outputs if run.outputs else ()
    return {
        "id": originals.run(run.info.run_id),
        "name": run.info.run_name,
        "status": run.info.status,
        "started": run.info.start_time,
        "ended": run.info.end_time,
        "tags": tags,
        "params": dict(run.data.params),
        "metrics": points,
        "datasets": [
            {**one.dataset.to_dictionary(), "tags": {tag.key: tag.value for tag in one.tags}}
            for one in run.inputs.dataset_inputs
        ],
        "outputs": [[originals.model(one.model_id), one.step] for one in outputs],
    }


def _plain_model(model: Any, originals: _OriginalIds) -> dict[str, Any]:
    return {
        "id": originals.model(model.model_id),
        "name": model.name,
        "kind": model.model_type,
        "run": originals.run(model.source_run_id) if model.source_run_id else "",
        "tags": {name: value for name, value in model.tags.items() if name not in _LOCAL_TAGS},
        "params": dict(model.params or {}),
        "metrics": sorted([one.key, one.value, one.timestamp, one.step] for one in model.metrics or ()),
    }


def _plain_registered(
    model: Any, versions: Sequence[Any], originals: _OriginalIds, at: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "name": model.name,
        "description": model.description or "",
        "tags": dict(model.tags),
        "aliases": {alias: int(number) for alias, number in model.aliases.items()},
        "versions": [
            {
                "number": int(version.version),
                "model": at.get(version.source, ""),
                "run": originals.run(version.run_id) if version.run_id else "",
                "description": version.description or "",
                "created": registered_at(version),
                "tags": {name: value for name, value in version.tags.items() if name != REGISTERED},
            }
            for version in versions
        ],
    }


def registered_at(version: Any) -> int:
    """The time of a version's first registration, in ms since 1970."""
    return int(version.tags.get(REGISTERED, version.creation_timestamp))


def _add_files(client: Any, place: str, folder: str, add_file: AddFile) -> None:
    local = local_path(place)
    if local is not None:
        _add_tree(local, folder, add_file)
        return
    from mlflow.artifacts import download_artifacts, list_artifacts

    if not list_artifacts(artifact_uri=place, tracking_uri=client.tracking_uri):
        return  # MLflow raises an error for an empty download
    with tempfile.TemporaryDirectory() as scratch:
        whole = download_artifacts(artifact_uri=place, dst_path=scratch, tracking_uri=client.tracking_uri)
        _add_tree(Path(whole), folder, add_file)


def _add_tree(local: Path, folder: str, add_file: AddFile) -> None:
    for path in sorted(local.rglob("*")):
        if path.is_file():
            add_file(f"{folder}/{path.relative_to(local).as_posix()}", path)
