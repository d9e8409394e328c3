"""Read the tracking store without disturbing its writers: a database without locks, new files and MLflow.

A database is read by SQL: MLflow's client takes four milliseconds a run and seconds to import, and does not list
deleted models. A server is read by its client.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hpo.database import Reader, reading
from hpo.home import Home
from hpo.records import StudyResult
from hpo.relocation import local_path
from hpo.tracking.runs import KIND, PARENT, TRIAL, artifact, children, find_parent, study_tags
from hpo.tracking.store import connect, database_address, exists, is_server, pages, translate_errors


@dataclass(frozen=True)
class Experiment:
    """An experiment, which has the name of a study. location is the address of its artifacts.

    A deleted one can still be restored.
    """

    id: str
    name: str
    location: str
    deleted: bool


@dataclass(frozen=True)
class Run:
    """A run with the tags that hpo uses, of a study's run all tags. status is RUNNING, FINISHED, FAILED or KILLED."""

    id: str
    experiment: str
    status: str
    location: str
    deleted: bool
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A logged model, m-..., and the id of the run that logged it."""

    id: str
    experiment: str
    location: str
    deleted: bool
    run: str


@dataclass(frozen=True)
class Version:
    """A registered version. location is the address of its files."""

    name: str
    version: int
    location: str
    run: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrackingSnapshot:
    """All that the tracking store holds, except parameters and metrics. schema is its alembic version.

    Runs are sorted oldest first, as runs.find_parent prefers the oldest.
    """

    experiments: tuple[Experiment, ...] = ()
    runs: tuple[Run, ...] = ()
    models: tuple[Model, ...] = ()
    versions: tuple[Version, ...] = ()
    schema: str = ""

    def registered(self, model: Model) -> bool:
        """True where a registered version loads the files of this model."""
        return any(version.location == model.location for version in self.versions)


def read_tracking(home: Home) -> TrackingSnapshot | None:
    """The content of the tracking store; None where there is none yet. Raises StoreError."""
    if is_server(home.tracking_uri):
        return _from_server(home)
    with reading(home.tracking_uri) as reader:
        return _from_database(reader) if reader is not None else None


@translate_errors
def parent_runs(home: Home) -> list[Run]:
    """The runs of studies and of copied versions that are not deleted, with all their tags. Raises StoreError."""
    if is_server(home.tracking_uri):
        client = connect(home)
        found: list[Run] = []
        known = [each.experiment_id for each in pages(client.search_experiments, max_results=1000)]
        for first in range(0, len(known), 100):
            ids, wanted = known[first : first + 100], f"tags.`{KIND}` != 'trial'"
            every = pages(client.search_runs, experiment_ids=ids, filter_string=wanted, max_results=1000)
            found += [replace(as_run(run), tags=run.data.tags) for run in every]
        return found
    if not exists(home):
        return []
    with reading(database_address(home)) as reader:
        if reader is None or "tags" not in reader.tables():
            return []
        return [run for run in _runs(reader, parents=True) if not run.deleted]


@translate_errors
def study_run(home: Home, study: StudyResult) -> Run | None:
    """The run of a study's generation, the oldest if several were made; None where it has none. Raises StoreError."""
    if is_server(home.tracking_uri):
        parent = find_parent(connect(home), study)
        return replace(as_run(parent), tags=parent.data.tags) if parent is not None else None
    found = [run for run in parent_runs(home) if study_tags(study).items() <= run.tags.items()]
    return found[-1] if found else None


@translate_errors
def trial_runs(home: Home, parent: Run, *, number: int | None = None) -> list[Run]:
    """The runs of a study's trials, or of one, that are not deleted, newest first; parent is the study's run."""
    if is_server(home.tracking_uri):
        client = connect(home)
        wanted = f"tags.`{TRIAL}` = '{number}'" if number is not None else ""
        return [as_run(run) for run in children(client, client.get_run(parent.id), wanted)]
    with reading(database_address(home)) as reader:
        found = _runs(reader, parent.experiment) if reader is not None else ()
        own = [run for run in found if run.tags.get(PARENT) == parent.id and not run.deleted]
    return [run for run in own if number is None or run.tags.get(TRIAL) == str(number)]


@translate_errors
def run_file(home: Home, run: Run, path: str, folder: str) -> Path | None:
    """A file of a run, where it lies in an embedded store, else a copy in folder; None where the run has none."""
    place = local_path(run.location) if home.embedded else None
    if place is None:
        return artifact(connect(home), run.id, path, folder)
    file = home.check_inside(place / path)
    return file if file.is_file() else None


def _runs(reader: Reader, experiment: str | None = None, *, parents: bool = False) -> Iterator[Run]:
    """The runs of an experiment, or all runs, newest first. parents: without those of trials, with every tag."""
    chosen = "r.experiment_id = :experiment" if experiment is not None else "1 = 1"
    values: dict[str, Any] = {"experiment": int(experiment)} if experiment is not None else {}
    ours, names = " AND (t.key LIKE 'hpo.%' OR t.key LIKE 'mlflow.hpo.%' OR t.key = :parent)", {"parent": PARENT}
    if parents:
        chosen += " AND r.run_uuid IN (SELECT run_uuid FROM tags WHERE key = :kind AND value != 'trial')"
        values, ours, names = values | {"kind": KIND}, "", {}
    tags: dict[str, dict[str, str]] = {}
    query = (
        "SELECT t.run_uuid, t.key, t.value FROM tags t JOIN runs r ON r.run_uuid = t.run_uuid "  # noqa: S608
        f"WHERE {chosen}{ours}"
    )
    for run, key, value in reader.rows(query, **values, **names):
        tags.setdefault(run, {})[key] = value
    query = (
        "SELECT r.run_uuid, r.experiment_id, r.status, r.artifact_uri, r.lifecycle_stage FROM runs r "  # noqa: S608
        f"WHERE {chosen} ORDER BY r.start_time DESC, r.run_uuid"
    )
    for run, number, status, location, stage in reader.rows(query, **values):
        yield Run(run, str(number), status, location or "", stage == "deleted", tags.get(run, {}))


def _from_database(reader: Reader) -> TrackingSnapshot:
    schema = reader.schema()
    if not {"runs", "logged_models", "model_versions"} <= reader.tables():
        return TrackingSnapshot(schema=schema)  # its creation was cut short, or it is older than MLflow 3
    experiments = reader.rows("SELECT experiment_id, name, artifact_location, lifecycle_stage FROM experiments")
    models = reader.rows(
        "SELECT model_id, experiment_id, artifact_location, lifecycle_stage, source_run_id FROM logged_models"
    )
    aliases: dict[tuple[str, int], list[str]] = {}
    for name, version, alias in reader.rows("SELECT name, version, alias FROM registered_model_aliases"):
        aliases.setdefault((name, int(version)), []).append(alias)
    versions = reader.rows("SELECT name, version, COALESCE(storage_location, source), run_id FROM model_versions")
    return TrackingSnapshot(
        tuple(Experiment(str(id_), name, place or "", stage == "deleted") for id_, name, place, stage in experiments),
        tuple(_runs(reader))[::-1],
        tuple(Model(id_, str(of), place or "", stage == "deleted", run or "") for id_, of, place, stage, run in models),
        tuple(_version(name, number, place, run, aliases) for name, number, place, run in versions),
        schema,
    )


@translate_errors
def _from_server(home: Home) -> TrackingSnapshot:
    """The same from a server, which does not list deleted models."""
    client = connect(home)
    experiments = [
        Experiment(each.experiment_id, each.name, each.artifact_location, each.lifecycle_stage == "deleted")
        for each in pages(client.search_experiments, view_type=3)
    ]
    runs: list[Run] = []
    models: list[Model] = []
    for experiment in experiments:
        runs += map(as_run, pages(client.search_runs, experiment_ids=[experiment.id], run_view_type=3))
        models += [
            Model(each.model_id, each.experiment_id, each.artifact_location, False, each.source_run_id or "")
            for each in pages(client.search_logged_models, experiment_ids=[experiment.id])
        ]
    aliases: dict[tuple[str, int], list[str]] = {}
    for model in pages(client.search_registered_models):
        for alias, version in model.aliases.items():
            aliases.setdefault((model.name, int(version)), []).append(alias)
    versions = [
        _version(each.name, each.version, each.source, each.run_id, aliases)
        for each in pages(client.search_model_versions)
    ]
    return TrackingSnapshot(tuple(experiments), tuple(runs[::-1]), tuple(models), tuple(versions))


def _version(
    name: str, number: str | int, location: str | None, run: str | None, aliases: Mapping[tuple[str, int], list[str]]
) -> Version:
    return Version(name, int(number), location or "", run or "", tuple(sorted(aliases.get((name, int(number)), ()))))


def as_run(run: Any) -> Run:
    """An mlflow Run as a record."""
    tags = {
        name: text for name, text in run.data.tags.items() if name.startswith(("hpo.", "mlflow.hpo.")) or name == PARENT
    }
    info = run.info
    return Run(info.run_id, info.experiment_id, info.status, info.artifact_uri, info.lifecycle_stage == "deleted", tags)
