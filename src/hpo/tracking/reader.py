"""Look at the tracking store beside those who write it: for a database no lock, no file made, and no MLflow loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from hpo.database import Reader, reading
from hpo.home import Home
from hpo.tracking.runs import PARENT, children
from hpo.tracking.store import connect, told


@dataclass(frozen=True)
class Experiment:
    """An experiment: one study's name. place is the address of its artifacts; deleted ones can still be restored."""

    key: str
    name: str
    place: str
    deleted: bool


@dataclass(frozen=True)
class Run:
    """A run, with our tags and mlflow.parentRunId; status is RUNNING, FINISHED, FAILED or KILLED."""

    key: str
    experiment: str
    status: str
    place: str
    deleted: bool
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A logged model, m-..., and the run that it was logged by."""

    key: str
    experiment: str
    place: str
    deleted: bool
    run: str


@dataclass(frozen=True)
class Version:
    """A registered version; place is the address of its files."""

    name: str
    version: int
    place: str
    run: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tracking:
    """All that the tracking store holds but parameters and metrics. schema is its database's alembic version, or ""."""

    experiments: tuple[Experiment, ...] = ()
    runs: tuple[Run, ...] = ()
    models: tuple[Model, ...] = ()
    versions: tuple[Version, ...] = ()
    schema: str = ""

    def registered(self, model: Model) -> bool:
        """Whether a version in the registry loads this model's files."""
        return any(version.place == model.place for version in self.versions)


def look(home: Home) -> Tracking | None:
    """What the tracking store holds; None where there is none yet. Raises StoreError."""
    if home.tracking_uri.startswith(("http://", "https://")):
        return _ask(home)
    with reading(home.tracking_uri) as reader:
        return _read(reader) if reader is not None else None


@told
def trial_runs(home: Home, parent: Any) -> list[Run]:
    """The runs of a study's trials, the newest first; parent is its mlflow Run.

    A database is asked for these few columns: MLflow itself takes four milliseconds a run.
    """
    if home.tracking_uri.startswith(("http://", "https://")):
        return [_run(one) for one in children(connect(home), parent)]
    with reading(home.tracking_uri) as reader:
        if reader is None:
            return []
        tags: dict[str, dict[str, str]] = {}
        query = (
            "SELECT t.run_uuid, t.key, t.value FROM tags t JOIN tags p ON p.run_uuid = t.run_uuid "
            "WHERE p.key = :key AND p.value = :parent"
        )
        for run, key, value in reader.rows(query, key=PARENT, parent=parent.info.run_id):
            tags.setdefault(run, {})[key] = value
        rows = reader.rows(
            "SELECT run_uuid, status, artifact_uri FROM runs WHERE experiment_id = :experiment "
            "AND lifecycle_stage = 'active' ORDER BY start_time DESC, run_uuid",
            experiment=int(parent.info.experiment_id),
        )
    number = parent.info.experiment_id
    return [Run(run, number, status, place or "", False, tags[run]) for run, status, place in rows if run in tags]


def place_of(uri: str) -> Path | None:
    """The folder of a file: address or of a plain path; None for what lies elsewhere."""
    parts = urlsplit(uri)
    if parts.scheme not in ("", "file"):
        return None
    return Path(unquote(parts.path)) if parts.scheme else Path(uri)


def _read(reader: Reader) -> Tracking:
    schema = reader.schema()
    if not {"runs", "logged_models", "model_versions"} <= reader.tables():
        return Tracking(schema=schema)  # not made to its end, or before MLflow 3
    tags: dict[str, dict[str, str]] = {}
    query = f"SELECT run_uuid, key, value FROM tags WHERE key LIKE 'hpo.%' OR key = '{PARENT}'"  # noqa: S608
    for run, key, value in reader.rows(query):
        tags.setdefault(run, {})[key] = value
    aliases: dict[tuple[str, int], list[str]] = {}
    for name, version, alias in reader.rows("SELECT name, version, alias FROM registered_model_aliases"):
        aliases.setdefault((name, int(version)), []).append(alias)
    return Tracking(
        experiments=tuple(
            Experiment(str(number), name, place or "", stage == "deleted")
            for number, name, place, stage in reader.rows(
                "SELECT experiment_id, name, artifact_location, lifecycle_stage FROM experiments"
            )
        ),
        runs=tuple(
            Run(run, str(number), status, place or "", stage == "deleted", tags.get(run, {}))
            for run, number, status, place, stage in reader.rows(
                "SELECT run_uuid, experiment_id, status, artifact_uri, lifecycle_stage FROM runs"
            )
        ),
        models=tuple(
            Model(model, str(number), place or "", stage == "deleted", run or "")
            for model, number, place, stage, run in reader.rows(
                "SELECT model_id, experiment_id, artifact_location, lifecycle_stage, source_run_id FROM logged_models"
            )
        ),
        versions=tuple(
            Version(name, int(number), place or "", run or "", tuple(sorted(aliases.get((name, int(number)), ()))))
            for name, number, place, run in reader.rows(
                "SELECT name, version, COALESCE(storage_location, source), run_id FROM model_versions"
            )
        ),
        schema=schema,
    )


@told
def _ask(home: Home) -> Tracking:
    """The same from a server, which keeps what logged models it has deleted to itself."""
    client = connect(home)
    experiments = [
        Experiment(one.experiment_id, one.name, one.artifact_location, one.lifecycle_stage == "deleted")
        for one in pages(client.search_experiments, view_type=3)
    ]
    numbers = [one.key for one in experiments]
    runs = [
        _run(one) for number in numbers for one in pages(client.search_runs, experiment_ids=[number], run_view_type=3)
    ]
    models = [
        Model(one.model_id, one.experiment_id, one.artifact_location, False, one.source_run_id or "")
        for number in numbers
        for one in pages(client.search_logged_models, experiment_ids=[number])
    ]
    aliases: dict[tuple[str, int], list[str]] = {}
    for model in pages(client.search_registered_models):
        for alias, version in model.aliases.items():
            aliases.setdefault((model.name, int(version)), []).append(alias)
    versions = [
        Version(
            one.name,
            int(one.version),
            one.source,
            one.run_id or "",
            tuple(sorted(aliases.get((one.name, int(one.version)), ()))),
        )
        for one in pages(client.search_model_versions)
    ]
    return Tracking(tuple(experiments), tuple(runs), tuple(models), tuple(versions))


def _run(one: Any) -> Run:
    return Run(
        one.info.run_id,
        one.info.experiment_id,
        one.info.status,
        one.info.artifact_uri,
        one.info.lifecycle_stage == "deleted",
        {name: text for name, text in one.data.tags.items() if name.startswith("hpo.") or name == PARENT},
    )


def pages(search: Any, **wanted: Any) -> Iterator[Any]:
    """What one of the client's searches finds, all pages of it."""
    token = None
    while True:
        page = search(**wanted, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
