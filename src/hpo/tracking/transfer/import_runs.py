"""Import an exported study, or copy a registered version, into another tracking store; both are safe to repeat."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hpo.errors import shown_address
from hpo.home import Home
from hpo.locks import lock
from hpo.records import ModelVersion, StudyResult
from hpo.tracking import champions, ledger, registry, runs
from hpo.tracking.ledger import Opening, add_openings
from hpo.tracking.models import delete_model, is_whole
from hpo.tracking.run_metrics import metrics_at
from hpo.tracking.store import connect, pages, passing_over, translate_errors
from hpo.tracking.transfer.export_runs import COPIED, URI, TrackedStudy, logged_models

_INCOMPLETE = "hpo.moving"  # tag of a version whose other tags are not yet written
MODEL_DIGEST = "hpo.model_digest"  # tag of a copied version: the digest of its files
_MOST_UNUSED = 100  # version numbers that an import uses up, so that its versions keep theirs
_CHUNK = 100  # runs created while a lock is held once; a server frees it after a minute

Extract = Callable[[str, Path], list[str]]


@dataclass
class Imports:
    """Counts of what was new in a store: runs, logged models, registered versions, files of runs and models."""

    runs: int = 0
    models: int = 0
    versions: int = 0
    files: int = 0
    notes: list[str] = field(default_factory=list)


@translate_errors
def import_runs(
    home: Home, study: StudyResult, tracked: TrackedStudy, extract: Extract, *, move_aliases: bool = False
) -> Imports:
    """Write into the store what it does not hold yet of an exported study.

    extract("runs/ID", folder) writes the files of a run into folder and returns their paths. After a kill, a repeated
    call completes the import. move_aliases: also away from versions that are here. Raises StoreError.
    """
    added = Imports()
    add_openings(home, tracked.openings)
    if not tracked.runs and tracked.registered is None:
        return added
    client = connect(home)
    with lock(home, "mlflow-open"):
        experiment = runs.experiment(client, home, study.name)
    ids = _create_runs(client, home, experiment, tracked.runs, added)
    models = _create_models(client, home, experiment, tracked.models, ids, extract, added)
    for run in tracked.runs:
        _fill_run(client, ids, models, run, extract, added)
    if tracked.registered is not None:
        with lock(home, "mlflow-register"):
            here = _register(client, tracked.registered, ids, models, added)
            _set_aliases(home, client, tracked.registered, here, added, move=move_aliases)
    return added


def _create_runs(
    client: Any, home: Home, experiment: str, wanted: Sequence[Mapping[str, Any]], added: Imports
) -> dict[str, str]:
    """Create the missing runs, without content; returns original id -> id in this store."""
    # Parents first: a child names its parent.
    ordered = sorted(wanted, key=lambda run: runs.PARENT in run["tags"])
    while True:
        with lock(home, "mlflow-open"):
            ids: dict[str, str] = {}
            for run in pages(client.search_runs, experiment_ids=[experiment], max_results=1000):
                ids.setdefault(run.data.tags.get(registry.COPY_OF, run.info.run_id), run.info.run_id)
            missing = [run for run in ordered if run["id"] not in ids]
            for run in missing[:_CHUNK]:
                made = client.create_run(
                    experiment,
                    start_time=run["started"],
                    tags={**_run_tags(run, ids, {}), registry.COPY_OF: run["id"]},
                    run_name=run["name"],
                )
                ids[run["id"]] = made.info.run_id
                added.runs += 1
        if len(missing) <= _CHUNK:
            return ids


def _run_tags(run: Mapping[str, Any], ids: Mapping[str, str], models: Mapping[str, str]) -> dict[str, str]:
    """The tags of a run with the ids of this store; tags that name a missing run or model are left out."""
    tags = dict(run["tags"])
    parent, model = tags.pop(runs.PARENT, None), tags.pop(runs.MODEL, "").removeprefix(URI)
    tags |= {runs.PARENT: ids[parent]} if parent in ids else {}
    return tags | ({runs.MODEL: URI + models[model]} if model in models else {})


def _create_models(
    client: Any,
    home: Home,
    experiment: str,
    wanted: Sequence[Mapping[str, Any]],
    ids: Mapping[str, str],
    extract: Extract,
    added: Imports,
) -> dict[str, str]:
    """Log the models that are missing or incomplete; returns original id -> id in this store."""
    with lock(home, "mlflow-open"):
        models: dict[str, str] = {}
        whole = set()
        for model in logged_models(client, experiment):
            models.setdefault(model.tags.get(registry.COPY_OF, model.model_id), model.model_id)
            whole |= {model.tags.get(registry.COPY_OF, model.model_id)} if is_whole(model) else set()
        for model in wanted:
            if model["id"] not in models:
                made = client.create_logged_model(
                    experiment,
                    name=model["name"],
                    source_run_id=ids.get(model["run"]),
                    tags={**model["tags"], registry.COPY_OF: model["id"]},
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
    client: Any, model_id: str, run_id: str | None, model: Mapping[str, Any], extract: Extract, added: Imports
) -> None:
    from mlflow.entities import Metric

    with tempfile.TemporaryDirectory() as scratch:
        added.files += len(extract(f"models/{model['id']}", Path(scratch)))
        _log_files(client, model_id, run_id, Path(scratch))
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
    added: Imports,
) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric

    digest = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
    there = client.get_run(ids[run["id"]])
    run_id = there.info.run_id
    tags = _run_tags(run, ids, models)
    if there.data.tags.get(COPIED) == digest and tags.items() <= there.data.tags.items():
        return
    # MLflow's databases store a point that they have already only once, and know parameters by name.
    params = {name: value for name, value in run["params"].items() if name not in there.data.params}
    runs.log(client, run_id, metrics=[Metric(*point) for point in run["metrics"]], params=params)
    datasets = []
    for dataset in run["datasets"]:
        known = {name: value for name, value in dataset.items() if name != "tags"}
        datasets.append(DatasetInput(Dataset(**known), [InputTag(*tag) for tag in dataset["tags"].items()]))
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
    # Last, so that a run with this tag is complete.
    runs.log(client, run_id, tags={**tags, COPIED: digest})


def _register(
    client: Any, model: Mapping[str, Any], ids: Mapping[str, str], models: Mapping[str, str], added: Imports
) -> dict[int, Any]:
    """Register the missing versions with their tags, under their own numbers where these are free.

    Returns number in the file -> MLflow's version here. Numbers stay if few are to be used up for that.
    """
    name = model["name"]
    with passing_over("RESOURCE_ALREADY_EXISTS"):
        client.create_registered_model(name, description=model["description"] or None)
    known = {each.source: each for each in pages(client.search_model_versions, filter_string=f"name = '{name}'")}
    here: dict[int, Any] = {}
    highest = max((version["number"] for version in model["versions"]), default=0)
    numbered = highest <= len(model["versions"]) + _MOST_UNUSED
    for version in sorted(model["versions"], key=lambda one: one["number"]):
        if version["model"] not in models:
            added.notes.append(f"version {version['number']} of {name} has no logged model, and is left out")
            continue
        place = client.get_logged_model(models[version["model"]]).artifact_location
        there = known.get(place)
        if there is None or _INCOMPLETE in there.tags:
            least = version["number"] if numbered else 0
            there = _add_version(client, name, place, version, ids, models, there, least=least)
            added.versions += 1
        here[version["number"]] = there
        for key, value in {**version["tags"], registry.REGISTERED: str(version["created"])}.items():
            if there.tags.get(key) != value:
                client.set_model_version_tag(name, there.version, key, value)
        if _INCOMPLETE in there.tags:
            client.delete_model_version_tag(name, there.version, _INCOMPLETE)
    return here


def _set_aliases(
    home: Home, client: Any, model: Mapping[str, Any], here: Mapping[int, Any], added: Imports, *, move: bool
) -> None:
    """Set the file's aliases. Without move, aliases that exist here stay, and versions of another origin bar all.

    No gate has looked at the file's models. The history of champions comes with the alias champion only.
    """
    name, registered = model["name"], client.get_registered_model(model["name"])
    numbers = {number: int(version.version) for number, version in here.items()}
    every = pages(client.search_model_versions, filter_string=f"name = '{name}'")
    alone = {int(each.version) for each in every} <= {*numbers.values()}
    wanted = {alias: numbers[number] for alias, number in model["aliases"].items() if number in numbers}
    now = {alias: int(number) for alias, number in registered.aliases.items()}
    moved = {alias for alias, number in wanted.items() if move or now.get(alias, number if alone else 0) == number}
    tags = champions.renumber_champions(model["tags"], numbers)
    if "champion" not in moved and not (alone and "champion" not in now):
        tags = {key: value for key, value in tags.items() if not key.startswith(champions.CHAMPION)}
    for key, value in tags.items():
        if key not in registered.tags:
            client.set_registered_model_tag(name, key, value)
    if "champion" in moved and (terms := champions.champions(home, name)) and terms[-1].version != wanted["champion"]:
        champions.record_champion(home, name, wanted["champion"], why="imported, and its alias moved by --move-aliases")
    for alias in sorted(wanted.keys() - moved):
        kept = f"stays at version {now[alias]}" if alias in now else "is not set"
        added.notes.append(
            f"alias {alias} {kept}; in the file it is version {wanted[alias]}. To move it: hpo import --move-aliases"
        )
    for alias in moved:
        if now.get(alias) != wanted[alias]:
            client.set_registered_model_alias(name, alias, str(wanted[alias]))


def _add_version(
    client: Any,
    name: str,
    place: str,
    version: Mapping[str, Any],
    ids: Mapping[str, str],
    models: Mapping[str, str],
    begun: Any | None,
    *,
    least: int,
) -> Any:
    """Register a version, or complete one whose registration was cut short, under the number `least` or a higher one.

    Lower numbers that are free here were deleted in the other store. They are used up, so that NAME/3 means the same
    version in both.
    """
    made, run_id = begun, ids.get(version["run"])
    while made is None or int(made.version) < least:
        if made is not None:
            client.delete_model_version(name, made.version)
        made = client.create_model_version(
            name,
            place,
            run_id=run_id,
            tags={_INCOMPLETE: "true"},
            description=version["description"] or None,
            # Without a run MLflow looks the model up in the tracking URI of the process, not of this client.
            model_id=models[version["model"]] if run_id else None,
            await_creation_for=0,
        )
    return made


@translate_errors
def copy_version(home: Home, version: ModelVersion, target: Home, *, openings: Sequence[Opening]) -> ModelVersion:
    """The version of `target` with the same files, copied there first if it has none.

    openings are those of the test part that measured the version; each becomes a tag of the copy. Aliases stay.
    Machines that share the study storage share the lock. Others may copy at the same time: of copies of the same files
    the lowest version stays. Raises StoreError, ModelError.
    """
    client = connect(home)
    source = client.get_model_version(version.name, str(version.version))
    run = client.get_run(version.run_id) if version.run_id else None
    with tempfile.TemporaryDirectory() as scratch, lock(target.create(), "mlflow-copy"):
        folder = registry.fetch(home, version, Path(scratch))
        digest = model_digest(folder)
        number = _find_copy(target, version.name, digest)
        if number is None:
            tags = {
                **source.tags,
                MODEL_DIGEST: digest,
                registry.ORIGIN: source.tags.get(registry.ORIGIN) or shown_address(home.tracking_uri),
                **{f"{ledger.TAG}{index}": json.dumps(asdict(look)) for index, look in enumerate(openings)},
            }
            added = _add_copy(target, version.name, folder, tags, run)
            number = _find_copy(target, version.name, digest) or added
            if number != added:
                _delete_copy(target, version.name, added)
    return registry.resolve(target, f"{version.name}/{number}")


@translate_errors
def _find_copy(target: Home, name: str, digest: str) -> int | None:
    """The lowest number of the versions with these files; None where there is none."""
    known = pages(connect(target).search_model_versions, filter_string=f"name = '{name}'")
    return min((int(each.version) for each in known if each.tags.get(MODEL_DIGEST) == digest), default=None)


@translate_errors
def _add_copy(target: Home, name: str, folder: Path, tags: Mapping[str, str], origin: Any) -> int:
    """Log and register the model in folder, with a run that has the parameters and scores of its original run."""
    client = connect(target)
    with passing_over("RESOURCE_ALREADY_EXISTS"):
        client.create_registered_model(name)
    place = runs.experiment(client, target, name)
    run_id = client.create_run(place, tags={runs.KIND: "copy", **tags}, run_name=f"{name}, copied").info.run_id
    logged = None
    try:
        if origin is not None:
            metrics = metrics_at(origin.data.metrics, time.time())
            runs.log(client, run_id, params=origin.data.params, metrics=metrics)
        logged = client.create_logged_model(place, name=name, source_run_id=run_id, tags=tags)
        with tempfile.TemporaryDirectory() as scratch:
            whole = shutil.copytree(folder, Path(scratch) / "model")
            _log_files(client, logged.model_id, run_id, whole)
        client.finalize_logged_model(logged.model_id, "READY")
        client.set_terminated(run_id)
        made = client.create_model_version(  # await_creation_for: as in registry
            name, logged.artifact_location, run_id=run_id, tags=tags, model_id=logged.model_id, await_creation_for=0
        )
    except BaseException:
        if logged is None or delete_model(client, logged.model_id):  # else its version was written
            client.delete_run(run_id)
        raise
    return int(made.version)


@translate_errors
def _delete_copy(target: Home, name: str, number: int) -> None:
    """Delete a version that was just added, with its logged model and its run."""
    client = connect(target)
    version = client.get_model_version(name, str(number))
    client.delete_model_version(name, str(number))
    for model in client.search_logged_models(
        [client.get_run(version.run_id).info.experiment_id], f"source_run_id = '{version.run_id}'"
    ):
        delete_model(client, model.model_id)
    client.delete_run(version.run_id)


def _log_files(client: Any, model_id: str, run_id: str | None, folder: Path) -> None:
    """Log the files of a model from another store; MLmodel, if there is one, gets the ids of this store."""
    from mlflow.models import Model

    if (folder / "MLmodel").is_file():
        facts = Model.load(str(folder))
        facts.model_id = facts.model_uuid = model_id
        facts.run_id = run_id
        facts.save(str(folder / "MLmodel"))
    client.log_model_artifacts(model_id, str(folder))


def model_digest(folder: Path) -> str:
    """sha256:... over the names and bytes of a model's files; MLmodel, which names where it was logged, is left out."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "MLmodel"):
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"
