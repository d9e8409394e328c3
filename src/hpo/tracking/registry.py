"""The model registry: versions of a study's models, their aliases, and names resolved to versions."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hpo.errors import ModelError
from hpo.home import Home
from hpo.locks import lock
from hpo.records import ModelVersion
from hpo.tracking.store import connect, exists, local_path, told

ORIGIN = "hpo.copied_from"  # tag of a version that came from another store
REGISTERED = "hpo.registered"  # tag of a version that was moved here: when it was first registered, in ms since 1970
_SCORE = "score."  # tags of a version that hold its scores: score.valid_accuracy, score.test_accuracy, ...
_MODEL = re.compile(r"(?P<name>[^/@:]+)(?:@(?P<alias>[^/@:]+)|/(?P<version>[0-9]+))?")


@told
def versions(home: Home, name: str | None = None) -> list[ModelVersion]:
    """All registered versions, or those of one name: by name, newest first. An empty store has none."""
    if not exists(home):
        return []
    client = connect(home)
    wanted = f"name = '{name}'" if name else None
    aliases: dict[tuple[str, int], list[str]] = {}
    for model in _pages(client.search_registered_models, wanted):
        for alias, version in model.aliases.items():
            aliases.setdefault((model.name, int(version)), []).append(alias)
    found = [
        _record(version, tuple(sorted(aliases.get((version.name, int(version.version)), ()))))
        for version in _pages(client.search_model_versions, wanted)
    ]
    return sorted(found, key=lambda version: (version.name, -version.version))


@told
def register(
    home: Home,
    name: str,
    model_uri: str,
    *,
    run_id: str,
    tags: Mapping[str, str],
    scores: Mapping[str, float],
    alias: str,
) -> ModelVersion:
    """Register models:/m-<id> under name and point alias at it; a model registered before keeps its version."""
    from mlflow.exceptions import MlflowException

    client = connect(home)
    model_id = model_uri.removeprefix("models:/")
    # The place itself: MLflow would look models:/m-<id> up in the process-wide tracking URI, not in this client's.
    source = client.get_logged_model(model_id).artifact_location
    with lock(home, "mlflow-register"):
        known = [v for v in _pages(client.search_model_versions, f"name = '{name}'") if v.source == source]
        if known:
            version = known[0]
        else:
            try:
                client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            version = client.create_model_version(
                name,
                source,
                run_id=run_id,
                tags={**tags, **_score_tags(scores)},
                model_id=model_id,
                await_creation_for=0,  # it is ready at once, and MLflow would print that it waits
            )
        client.set_registered_model_alias(name, alias, version.version)
    return _version(home, name, int(version.version))


@told
def set_alias(
    home: Home,
    name: str,
    alias: str,
    version: int,
    *,
    tags: Mapping[str, str] | None = None,
    scores: Mapping[str, float] | None = None,
) -> ModelVersion:
    """Point an alias at a version, away from any other; tags and scores (test_accuracy, ...) are added to it."""
    _version(home, name, version)
    client = connect(home)
    # The alias last: who finds a champion finds its scores.
    for key, value in {**(tags or {}), **_score_tags(scores or {})}.items():
        client.set_model_version_tag(name, str(version), key, value)
    client.set_registered_model_alias(name, alias, str(version))
    return _version(home, name, version)


@told
def add_scores(home: Home, version: ModelVersion, scores: Mapping[str, float]) -> ModelVersion:
    """The version with these scores (test_accuracy, ...) added to those that the registry has."""
    client = connect(home)
    for key, value in _score_tags(scores).items():
        client.set_model_version_tag(version.name, str(version.version), key, value)
    return _version(home, version.name, version.version)


@told
def resolve(home: Home, model: str) -> ModelVersion:
    """The version that a user means.

    model is NAME (its champion, else its challenger), NAME@ALIAS, NAME/VERSION, or an MLflow URI models:/...; a logged
    model that is not registered, models:/m-<id>, is version 0 of its study. Raises ModelError with what there is.
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


@told
def fetch(home: Home, version: ModelVersion, folder: Path) -> Path:
    """The local folder with a version's MLmodel: where it lies, or a copy in folder of what lies on a server.

    Raises ModelError where the files are gone.
    """
    client = connect(home)
    if version.version:
        uri = client.get_model_version_download_uri(version.name, str(version.version))
    else:
        uri = client.get_logged_model(version.model_uri.removeprefix("models:/")).artifact_location
    place = local_path(uri)
    if place is None:
        from mlflow.artifacts import download_artifacts

        return Path(download_artifacts(artifact_uri=uri, dst_path=str(folder), tracking_uri=home.tracking_uri))
    if not (place / "MLmodel").is_file():
        raise ModelError(
            f"{version.model_uri}: its files are not at {place}.",
            "They were deleted, or the project's folder was moved: move it back.",
        )
    return place


def _logged(home: Home, model_id: str) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        model = connect(home).get_logged_model(model_id) if exists(home) else None
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
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
    )


def _version(home: Home, name: str, number: int) -> ModelVersion:
    return resolve(home, f"{name}/{number}")


def _record(version: Any, aliases: tuple[str, ...]) -> ModelVersion:
    return ModelVersion(
        name=version.name,
        version=int(version.version),
        aliases=aliases,
        run_id=version.run_id or "",
        model_uri=f"models:/{version.name}/{version.version}",
        study=version.tags.get("hpo.study", version.name),
        trial=int(version.tags.get("hpo.trial", -1)),
        scores={
            name.removeprefix(_SCORE): float(value) for name, value in version.tags.items() if name.startswith(_SCORE)
        },
        created=int(version.tags.get(REGISTERED, version.creation_timestamp)) / 1000,
        origin=version.tags.get(ORIGIN, ""),
    )


def _score_tags(scores: Mapping[str, float]) -> dict[str, str]:
    return {f"{_SCORE}{name}": repr(float(value)) for name, value in scores.items()}


def _pages(search: Any, wanted: str | None) -> Iterator[Any]:
    token = None
    while True:
        page = search(filter_string=wanted, max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
