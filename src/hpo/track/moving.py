"""A study's side of MLflow as plain data, out of one tracking store and into another, each part there once.

The plain data speak of runs and logged models by the ids that they were born with: a copy has that id as a tag, and
whatever was copied before, or has come home, is found by it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpo.home import Home
from hpo.locks import lock
from hpo.records import StudyResult
from hpo.track import runs
from hpo.track.history import rewritten
from hpo.track.ledger import Opening, add_openings, openings
from hpo.track.look import pages
from hpo.track.registry import REGISTERED
from hpo.track.store import connect, exists, local_path, told

BORN = "hpo.moved_from"  # tag of a run or a logged model that was copied: the id of the first one
_WHOLE = "hpo.moved"  # tag of a run that was copied to its end: the digest of what was copied
_BEGUN = "hpo.moving"  # tag of a version whose other tags are still to come
_OWN = (BORN, _WHOLE, "mlflow.modelVersions")  # tags that belong to one store; a server writes the last one
_URI = "models:/"
_CHUNK = 100  # runs made under one hold of a lock, which a server frees after a minute

AddFile = Callable[[str, Path], None]
Extract = Callable[[str, Path], list[str]]


@dataclass
class Side:
    """What MLflow holds of a study, as JSON types.

    runs come with every point of their metrics [name, value, time in ms, step], the study's own run first. registered
    is the model of the study's name with all its versions, those of other generations too, or None. openings are the
    looks at the sealed test part.
    """

    runs: list[dict[str, Any]] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)
    registered: dict[str, Any] | None = None
    openings: list[Opening] = field(default_factory=list)


@dataclass
class Added:
    """How much was new in a store: runs, logged models, registered versions, files of runs and models."""

    runs: int = 0
    models: int = 0
    versions: int = 0
    files: int = 0
    notes: list[str] = field(default_factory=list)


@told
def take(home: Home, study: StudyResult, add_file: AddFile) -> Side:
    """What the store holds of a study; add_file("runs/ID/PATH" or "models/ID/PATH", file) gets each of its files.

    A store without the study's run gives what it has of the ledger. Runs and models that were deleted stay behind.
    Raises StoreError.
    """
    side = Side(openings=openings(home, study))
    if not exists(home):
        return side
    client = connect(home)
    parent = runs.find_parent(client, study)
    versions = sorted(
        pages(client.search_model_versions, filter_string=f"name = '{study.name}'"), key=lambda one: int(one.version)
    )
    found = {run.info.run_id: run for run in ([parent, *runs.children(client, parent)] if parent else [])}
    for run_id in {version.run_id for version in versions if version.run_id} - found.keys():
        run = _active_run(client, run_id)
        found |= {run_id: run} if run is not None else {}
    born = _Births(client)
    experiment = client.get_experiment_by_name(study.name)
    places = {version.source for version in versions}  # a search does not give their model_id
    models = [
        model
        for model in (_logged(client, experiment.experiment_id) if experiment is not None else ())
        if str(model.status) == "READY" and (model.artifact_location in places or model.source_run_id in found)
    ]
    born.models |= {model.model_id: model.tags.get(BORN, model.model_id) for model in models}
    born.runs |= {run_id: run.data.tags.get(BORN, run_id) for run_id, run in found.items()}
    for run in sorted(found.values(), key=lambda run: (runs.PARENT in run.data.tags, run.info.start_time)):
        side.runs.append(_plain_run(client, run, born))
        _add_files(client, run.info.artifact_uri, f"runs/{born.runs[run.info.run_id]}", add_file)
    for model in models:
        side.models.append(_plain_model(model, born))
        _add_files(client, model.artifact_location, f"models/{born.models[model.model_id]}", add_file)
    if versions:
        at = {model.artifact_location: born.models[model.model_id] for model in models}
        side.registered = _plain_registered(client.get_registered_model(study.name), versions, born, at)
    return side


@told
def put(home: Home, study: StudyResult, side: Side, extract: Extract) -> Added:
    """Have the store hold all of it; what it has already is completed where that is needed, and not written again.

    extract("runs/ID", folder) writes the files of a run there and returns their paths. Called again after a kill it
    ends as if it had never been cut short. Raises StoreError.
    """
    added = Added()
    add_openings(home, side.openings)
    if not side.runs and side.registered is None:
        return added
    client = connect(home)
    with lock(home, "mlflow-open"):
        experiment = runs.experiment(client, home, study.name)
    ids = _enter_runs(client, home, experiment, side.runs, added)
    models = _enter_models(client, home, experiment, side.models, ids, extract, added)
    for run in side.runs:
        _fill_run(client, ids, models, run, extract, added)
    if side.registered is not None:
        with lock(home, "mlflow-register"):
            _register(client, side.registered, ids, models, added)
    return added


class _Births:
    """The ids that runs and models were born with."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.runs: dict[str, str] = {}
        self.models: dict[str, str] = {}

    def run(self, run_id: str) -> str:
        if run_id not in self.runs:
            run = _active_run(self._client, run_id)
            self.runs[run_id] = run.data.tags.get(BORN, run_id) if run is not None else run_id
        return self.runs[run_id]

    def model(self, model_id: str) -> str:
        return self.models.get(model_id, model_id)


def _logged(client: Any, experiment: str) -> Iterator[Any]:
    yield from pages(client.search_logged_models, experiment_ids=[experiment], max_results=100)


def _active_run(client: Any, run_id: str) -> Any | None:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _plain_run(client: Any, run: Any, born: _Births) -> dict[str, Any]:
    tags = {name: value for name, value in run.data.tags.items() if name not in _OWN}
    if runs.PARENT in tags:
        tags[runs.PARENT] = born.run(tags[runs.PARENT])
    if runs.MODEL in tags:
        tags[runs.MODEL] = _URI + born.model(tags[runs.MODEL].removeprefix(_URI))
    points = [
        [point.key, point.value, point.timestamp, point.step]
        for name in sorted(run.data.metrics)
        for point in client.get_metric_history(run.info.run_id, name)
    ]
    return {
        "id": born.run(run.info.run_id),
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
        "outputs": [[born.model(one.model_id), one.step] for one in (run.outputs.model_outputs if run.outputs else ())],
    }


def _plain_model(model: Any, born: _Births) -> dict[str, Any]:
    return {
        "id": born.model(model.model_id),
        "name": model.name,
        "kind": model.model_type,
        "run": born.run(model.source_run_id) if model.source_run_id else "",
        "tags": {name: value for name, value in model.tags.items() if name not in _OWN},
        "params": dict(model.params or {}),
        "metrics": sorted([one.key, one.value, one.timestamp, one.step] for one in model.metrics or ()),
    }


def _plain_registered(model: Any, versions: Sequence[Any], born: _Births, at: Mapping[str, str]) -> dict[str, Any]:
    return {
        "name": model.name,
        "description": model.description or "",
        "tags": dict(model.tags),
        "aliases": {alias: int(number) for alias, number in model.aliases.items()},
        "versions": [
            {
                "number": int(version.version),
                "model": at.get(version.source, ""),
                "run": born.run(version.run_id) if version.run_id else "",
                "description": version.description or "",
                "created": _created(version),
                "tags": {name: value for name, value in version.tags.items() if name != REGISTERED},
            }
            for version in versions
        ],
    }


def _created(version: Any) -> int:
    """When a version was first registered, in ms since 1970."""
    return int(version.tags.get(REGISTERED, version.creation_timestamp))


def _add_files(client: Any, place: str, folder: str, add_file: AddFile) -> None:
    local = local_path(place)
    if local is not None:
        _add_tree(local, folder, add_file)
        return
    from mlflow.artifacts import download_artifacts

    with tempfile.TemporaryDirectory() as scratch:
        whole = download_artifacts(artifact_uri=place, dst_path=scratch, tracking_uri=client.tracking_uri)
        _add_tree(Path(whole), folder, add_file)


def _add_tree(local: Path, folder: str, add_file: AddFile) -> None:
    for path in sorted(local.rglob("*")):
        if path.is_file():
            add_file(f"{folder}/{path.relative_to(local).as_posix()}", path)


def _enter_runs(
    client: Any, home: Home, experiment: str, wanted: Sequence[Mapping[str, Any]], added: Added
) -> dict[str, str]:
    """Make the runs that are not there, still empty; returns born id -> id here."""
    # Parents first: a child names its parent.
    ordered = sorted(wanted, key=lambda run: runs.PARENT in run["tags"])
    while True:
        with lock(home, "mlflow-open"):
            ids: dict[str, str] = {}
            for run in pages(client.search_runs, experiment_ids=[experiment], max_results=1000):
                ids.setdefault(run.data.tags.get(BORN, run.info.run_id), run.info.run_id)
            missing = [run for run in ordered if run["id"] not in ids]
            for run in missing[:_CHUNK]:
                made = client.create_run(
                    experiment,
                    start_time=run["started"],
                    tags={**_run_tags(run, ids, {}), BORN: run["id"]},
                    run_name=run["name"],
                )
                ids[run["id"]] = made.info.run_id
                added.runs += 1
        if len(missing) <= _CHUNK:
            return ids


def _run_tags(run: Mapping[str, Any], ids: Mapping[str, str], models: Mapping[str, str]) -> dict[str, str]:
    """The tags of a run, with the ids of this store; without those that name what is not here (yet)."""
    tags = dict(run["tags"])
    parent, model = tags.pop(runs.PARENT, None), tags.pop(runs.MODEL, "").removeprefix(_URI)
    tags |= {runs.PARENT: ids[parent]} if parent in ids else {}
    return tags | ({runs.MODEL: _URI + models[model]} if model in models else {})


def _enter_models(
    client: Any,
    home: Home,
    experiment: str,
    wanted: Sequence[Mapping[str, Any]],
    ids: Mapping[str, str],
    extract: Extract,
    added: Added,
) -> dict[str, str]:
    """Log the models that are not there whole; returns born id -> id here."""
    with lock(home, "mlflow-open"):
        models: dict[str, str] = {}
        whole = set()
        for model in _logged(client, experiment):
            models.setdefault(model.tags.get(BORN, model.model_id), model.model_id)
            whole |= {model.tags.get(BORN, model.model_id)} if str(model.status) == "READY" else set()
        for model in wanted:
            if model["id"] not in models:
                made = client.create_logged_model(
                    experiment,
                    name=model["name"],
                    source_run_id=ids.get(model["run"]),
                    tags={**model["tags"], BORN: model["id"]},
                    params=model["params"],
                    model_type=model["kind"],
                )
                models[model["id"]] = made.model_id
    for model in wanted:
        if model["id"] not in whole:
            _fill_model(client, models[model["id"]], ids.get(model["run"]), model, extract, added)
            added.models += 1
    return models


def _fill_model(
    client: Any, model_id: str, run_id: str | None, model: Mapping[str, Any], extract: Extract, added: Added
) -> None:
    from mlflow.entities import Metric
    from mlflow.models import Model

    with tempfile.TemporaryDirectory() as scratch:
        added.files += len(extract(f"models/{model['id']}", Path(scratch)))
        if (Path(scratch) / "MLmodel").is_file():
            # The same file, but for what says which model of which run it is.
            facts = Model.load(scratch)
            facts.model_id = facts.model_uuid = model_id
            facts.run_id = run_id
            facts.save(str(Path(scratch) / "MLmodel"))
        client.log_model_artifacts(model_id, scratch)
    if run_id and model["metrics"]:
        scores = [Metric(*point, model_id=model_id, run_id=run_id) for point in model["metrics"]]
        client.log_batch(run_id, metrics=scores)
    client.finalize_logged_model(model_id, "READY")


def _fill_run(
    client: Any,
    ids: Mapping[str, str],
    models: Mapping[str, str],
    run: Mapping[str, Any],
    extract: Extract,
    added: Added,
) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric

    digest = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
    there = client.get_run(ids[run["id"]])
    run_id = there.info.run_id
    tags = _run_tags(run, ids, models)
    if there.data.tags.get(_WHOLE) == digest and tags.items() <= there.data.tags.items():
        return
    # MLflow's databases take a point that they have already as the same one, and know parameters by name.
    params = {name: value for name, value in run["params"].items() if name not in there.data.params}
    runs.log(client, run_id, metrics=[Metric(*point) for point in run["metrics"]], params=params)
    datasets = []
    for told_of in run["datasets"]:
        known = {name: value for name, value in told_of.items() if name != "tags"}
        datasets.append(DatasetInput(Dataset(**known), [InputTag(*tag) for tag in told_of["tags"].items()]))
    if datasets:
        client.log_inputs(run_id, datasets)
    logged = {one.model_id for one in (there.outputs.model_outputs if there.outputs else ())}
    outputs = [(models[model], step) for model, step in run["outputs"] if model in models]
    if new := [LoggedModelOutput(model, step) for model, step in outputs if model not in logged]:
        client.log_outputs(run_id, new)
    with tempfile.TemporaryDirectory() as scratch:
        files = extract(f"runs/{run['id']}", Path(scratch))
        if files:
            client.log_artifacts(run_id, scratch)
        added.files += len(files)
    if run["status"] != "RUNNING":
        client.set_terminated(run_id, run["status"], end_time=run["ended"])
    # Last: what is marked whole is whole.
    runs.log(client, run_id, tags={**tags, _WHOLE: digest})


def _register(
    client: Any, model: Mapping[str, Any], ids: Mapping[str, str], models: Mapping[str, str], added: Added
) -> None:
    """Register the versions that are not there, under their numbers where these are free, and bring tags and aliases.

    An alias that is here already moves only to a version that was registered later.
    """
    from mlflow.exceptions import MlflowException

    name = model["name"]
    try:
        client.create_registered_model(name, description=model["description"] or None)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = {each.source: each for each in pages(client.search_model_versions, filter_string=f"name = '{name}'")}
    here: dict[int, Any] = {}
    for version in sorted(model["versions"], key=lambda one: one["number"]):
        if version["model"] not in models:
            added.notes.append(f"version {version['number']} of {name} has no logged model, and stays behind")
            continue
        place = client.get_logged_model(models[version["model"]]).artifact_location
        there = known.get(place)
        if there is None or _BEGUN in there.tags:
            there = _add_version(client, name, place, version, ids, models, there)
            added.versions += 1
        here[version["number"]] = there
        for key, value in {**version["tags"], REGISTERED: str(version["created"])}.items():
            if there.tags.get(key) != value:
                client.set_model_version_tag(name, there.version, key, value)
        if _BEGUN in there.tags:
            client.delete_model_version_tag(name, there.version, _BEGUN)
    numbers = {number: int(version.version) for number, version in here.items()}
    registered = client.get_registered_model(name)
    for key, value in rewritten(model["tags"], numbers).items():
        if key not in registered.tags:
            client.set_registered_model_tag(name, key, value)
    created = {version["number"]: version["created"] for version in model["versions"]}
    for alias, number in model["aliases"].items():
        if number not in here:
            continue
        now = registered.aliases.get(alias)
        before = client.get_model_version(name, str(now)) if now is not None else None
        if before is None or created[number] > _created(before):
            client.set_registered_model_alias(name, alias, here[number].version)


def _add_version(
    client: Any,
    name: str,
    place: str,
    version: Mapping[str, Any],
    ids: Mapping[str, str],
    models: Mapping[str, str],
    begun: Any | None,
) -> Any:
    """Register a version, or take the one that was begun. Lower numbers that are free here were deleted in its store.

    They are used up, so that NAME/3 means the same in both.
    """
    made = begun
    while made is None or int(made.version) < version["number"]:
        if made is not None:
            client.delete_model_version(name, made.version)
        made = client.create_model_version(
            name,
            place,
            run_id=ids.get(version["run"]),
            tags={_BEGUN: "true"},
            description=version["description"] or None,
            model_id=models[version["model"]],
            await_creation_for=0,
        )
    return made
