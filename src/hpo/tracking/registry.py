"""The model registry: versions of models and their aliases, and names resolved to versions."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpo.database import reading
from hpo.errors import ModelError
from hpo.home import Home
from hpo.locks import lock
from hpo.records import ModelVersion
from hpo.relocation import local_path
from hpo.tracking.models import is_whole
from hpo.tracking.run_metrics import score_name, stored_name
from hpo.tracking.store import (
    connect,
    database_address,
    exists,
    is_missing,
    is_server,
    pages,
    passing_over,
    translate_errors,
)

ORIGIN = "hpo.copied_from"  # tag of a version that came from another store
COPY_OF = "hpo.moved_from"  # tag of a copied run or logged model: the id of the original
REGISTERED = "hpo.registered"  # tag of a version that was moved here: when it was first registered, in ms since 1970
_SCORE = "score."  # tags of a version that hold its scores: score.valid_accuracy, score.test_accuracy, ...
_DESCRIPTION = 4990  # characters
_CARD = "hpo.card"  # tag of a version whose description is a card: its digest
_NOTE = re.compile(r"Trial [0-9]+ of .*To use it: `hpo predict [^`]*`", re.DOTALL)  # as runs.version_note writes it
_MODEL = re.compile(r"(?P<name>[^/@:]+)(?:@(?P<alias>[^/@:]+)|/(?P<version>[0-9]+))?")


@translate_errors
def versions(home: Home, name: str | None = None) -> list[ModelVersion]:
    """All registered versions, or those of one name, sorted by name, newest first. An empty store has none."""
    found = _from_server(home, name) if is_server(home.tracking_uri) else _from_database(home, name)
    return sorted(found, key=lambda version: (version.name, -version.version))


def _from_server(home: Home, name: str | None) -> list[ModelVersion]:
    client = connect(home)
    wanted = {"filter_string": f"name = '{name}'" if name else None}
    aliases: dict[tuple[str, int], list[str]] = {}
    for model in pages(client.search_registered_models, **wanted):
        for alias, version in model.aliases.items():
            aliases.setdefault((model.name, int(version)), []).append(alias)
    return [
        _record(
            each.name,
            int(each.version),
            each.run_id,
            each.creation_timestamp,
            each.tags,
            aliases.get((each.name, int(each.version)), []),
        )
        for each in pages(client.search_model_versions, **wanted)
    ]


def _from_database(home: Home, name: str | None) -> list[ModelVersion]:
    """The same by SQL: MLflow's client takes seconds to import."""
    if not exists(home):
        return []
    with reading(database_address(home)) as reader:
        if reader is None or "model_versions" not in reader.tables():
            return []
        tags: dict[tuple[str, int], dict[str, str]] = {}
        aliases: dict[tuple[str, int], list[str]] = {}
        for of, version, key, value in reader.rows("SELECT name, version, key, value FROM model_version_tags"):
            tags.setdefault((of, version), {})[key] = value
        for of, version, alias in reader.rows("SELECT name, version, alias FROM registered_model_aliases"):
            aliases.setdefault((of, version), []).append(alias)
        rows = reader.rows(
            "SELECT name, version, run_id, creation_time FROM model_versions "
            "WHERE current_stage <> 'Deleted_Internal' AND (name = :name OR :name IS NULL)",
            name=name,
        )
    return [
        _record(of, version, run, created, tags.get((of, version), {}), aliases.get((of, version), []))
        for of, version, run, created in rows
    ]


@translate_errors
def register(
    home: Home,
    name: str,
    model_uri: str,
    *,
    run_id: str,
    tags: Mapping[str, str],
    scores: Mapping[str, float],
    description: str = "",
    question: str = "",
    challenger: bool = True,
) -> ModelVersion:
    """Register models:/m-<id> under name, as challenger; a model registered before keeps its version.

    The champion does not become a challenger: then there is none. challenger=False leaves aliases as they are.
    description is of the version, question of all of its versions. Raises ModelError where the model is not whole.
    """
    client = connect(home)
    model_id = model_uri.removeprefix("models:/")
    # The location itself: MLflow would look models:/m-<id> up in the tracking URI of the process, not of this client.
    source = client.get_logged_model(model_id).artifact_location
    with lock(home, "mlflow-register"):
        if not is_whole(client.get_logged_model(model_id)):
            raise ModelError(f"{model_uri}: its files are gone, so it is not registered.", f"Run it: hpo run {name}")
        known = [v for v in pages(client.search_model_versions, filter_string=f"name = '{name}'") if v.source == source]
        if known:
            version = known[0]
        else:
            with passing_over("RESOURCE_ALREADY_EXISTS"):
                client.create_registered_model(name, description=question or None)
            version = client.create_model_version(
                name,
                source,
                run_id=run_id,
                tags={**tags, **_score_tags(scores)},
                description=description or None,
                model_id=model_id,
                await_creation_for=0,  # it is ready at once, and MLflow would print that it waits
            )
        aliases = client.get_registered_model(name).aliases
        champion = str(aliases.get("champion")) == str(version.version)
        if challenger and not champion:
            client.set_registered_model_alias(name, "challenger", version.version)
        elif challenger and "challenger" in aliases:
            client.delete_registered_model_alias(name, "challenger")
    return _version(home, name, int(version.version))


@translate_errors
def set_alias(
    home: Home,
    name: str,
    alias: str,
    version: int,
    *,
    tags: Mapping[str, str] | None = None,
    scores: Mapping[str, float] | None = None,
) -> ModelVersion:
    """Move an alias to a version; tags and scores (test_accuracy, ...) are added to that version.

    A challenger that becomes champion is no challenger any more.
    """
    _version(home, name, version)
    client = connect(home)
    # The alias last, so that a champion always has its scores.
    for key, value in {**(tags or {}), **_score_tags(scores or {})}.items():
        client.set_model_version_tag(name, str(version), key, value)
    client.set_registered_model_alias(name, alias, str(version))
    moved = _version(home, name, version)
    if alias == "champion" and "challenger" in moved.aliases:
        client.delete_registered_model_alias(name, "challenger")
        moved = _version(home, name, version)
    return moved


@translate_errors
def add_scores(home: Home, version: ModelVersion, scores: Mapping[str, float]) -> ModelVersion:
    """Add scores (test_accuracy, ...) to those of a version; returns the version with all of them."""
    client = connect(home)
    for key, value in _score_tags(scores).items():
        client.set_model_version_tag(version.name, str(version.version), key, value)
    return _version(home, version.name, version.version)


@translate_errors
def describe(home: Home, version: ModelVersion, text: str) -> bool:
    """Make a text the description of a version; MLflow keeps 5,000 characters, so a longer one is cut after a line.

    A description that a person wrote or changed stays, and the answer is False.
    """
    client, number = connect(home), str(version.version)
    found = client.get_model_version(version.name, number)
    present = (found.description or "").strip()
    if present and found.tags.get(_CARD) != _digest(present) and not _NOTE.fullmatch(present):
        return False
    kept = text if len(text) <= _DESCRIPTION else text[:_DESCRIPTION].rpartition("\n")[0]
    client.set_model_version_tag(version.name, number, _CARD, _digest(kept.strip()))
    client.update_model_version(version.name, number, description=kept)
    return True


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@translate_errors
def resolve(home: Home, model: str) -> ModelVersion:
    """The version that a name refers to.

    model is NAME (its champion, else its challenger), NAME@ALIAS, NAME/VERSION, or an MLflow URI models:/...; a logged
    model that is not registered, models:/m-<id>, is version 0 of its study. Raises ModelError, which lists the
    known names or versions.
    """
    text = model.removeprefix("models:/").strip("/")
    if model.startswith("models:/") and re.fullmatch(r"m-[0-9a-f]+", text):
        return _logged(home, text)
    match = _MODEL.fullmatch(text)
    if match is None:
        raise ModelError(f"{model!r} is not the name of a model.", "Write NAME, NAME@champion or NAME/3: hpo models")
    name, alias, number = match["name"], match["alias"], match["version"]
    known = versions(home, name)
    if not known:
        names = sorted({version.name for version in versions(home)})
        close = difflib.get_close_matches(name, names, n=1)
        there = f"There is: {', '.join(names)}." if names else "There is none yet: hpo run registers one."
        hint = f"Did you mean {close[0]}? {there}" if close else there
        raise ModelError(f"there is no registered model named {name!r}.", hint)
    if number:
        chosen = [version for version in known if version.version == int(number)]
    else:
        wanted = [alias] if alias else ["champion", "challenger"]
        chosen = [version for each in wanted for version in known if each in version.aliases]
    if not chosen:
        listed = ", ".join("@".join([f"{name}/{v.version}", *v.aliases]) for v in known)
        asked = f"version {number}" if number else f"alias {alias}" if alias else "alias champion or challenger"
        raise ModelError(f"model {name!r} has no {asked}.", f"There is: {listed}.")
    return chosen[0]


@translate_errors
def fetch(home: Home, version: ModelVersion, folder: Path) -> Path:
    """The local folder with the MLmodel of a version: its own, or a copy in `folder` of files on a server.

    Raises ModelError where the files are gone.
    """
    uri = _location(home, version)
    local = local_path(uri)
    if local is None:
        from mlflow.artifacts import download_artifacts

        return Path(download_artifacts(artifact_uri=uri, dst_path=str(folder), tracking_uri=home.tracking_uri))
    if not (local / "MLmodel").is_file():
        raise ModelError(
            f"{version.model_uri}: its files are not at {local}.",
            "They were deleted, or the project's folder was moved: move it back.",
        )
    return local


def _location(home: Home, version: ModelVersion) -> str:
    """The address of the files of a version, or of a logged model, which is version 0."""
    if not version.version:
        return str(connect(home).get_logged_model(version.model_uri.removeprefix("models:/")).artifact_location)
    if is_server(home.tracking_uri):
        return str(connect(home).get_model_version_download_uri(version.name, str(version.version)))
    query = "SELECT COALESCE(storage_location, source) FROM model_versions WHERE name = :name AND version = :version"
    with reading(database_address(home)) as reader:
        rows = reader.rows(query, name=version.name, version=version.version) if reader is not None else ()
    if not rows:
        raise ModelError(f"{version.model_uri} is gone.", "List what there is: hpo models")
    return str(rows[0][0])


def _logged(home: Home, model_id: str) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        model = connect(home).get_logged_model(model_id) if exists(home) else None
    except MlflowException as error:
        if not is_missing(error):
            raise
        model = None
    if model is None:
        raise ModelError(f"there is no logged model {model_id}.", "List registered ones: hpo models")
    return ModelVersion(
        name=model.tags.get("hpo.study", model.name),
        version=0,
        aliases=(),
        run_id=model.source_run_id or "",
        model_uri=f"models:/{model_id}",
        study=model.tags.get("hpo.study", ""),
        trial=int(model.tags.get("hpo.trial", -1)),
        created=model.creation_timestamp / 1000,
        foreign=not {COPY_OF, ORIGIN}.isdisjoint(model.tags),
    )


def _version(home: Home, name: str, number: int) -> ModelVersion:
    return resolve(home, f"{name}/{number}")


def _record(
    name: str, version: int, run_id: str | None, created: int, tags: Mapping[str, str], aliases: Sequence[str]
) -> ModelVersion:
    return ModelVersion(
        name=name,
        version=version,
        aliases=tuple(sorted(aliases)),
        run_id=run_id or "",
        model_uri=f"models:/{name}/{version}",
        study=tags.get("hpo.study", name),
        trial=int(tags.get("hpo.trial", -1)),
        scores={
            score_name(tag.removeprefix(_SCORE)): float(value) for tag, value in tags.items() if tag.startswith(_SCORE)
        },
        created=int(tags.get(REGISTERED, created)) / 1000,
        origin=tags.get(ORIGIN, ""),
        foreign=not {REGISTERED, ORIGIN}.isdisjoint(tags),
    )


def _score_tags(scores: Mapping[str, float]) -> dict[str, str]:
    return {f"{_SCORE}{stored_name(name)}": repr(float(value)) for name, value in scores.items()}
