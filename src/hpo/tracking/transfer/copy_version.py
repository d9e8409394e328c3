"""Copy a registered version to another store: its files, its signature, and what is known of it, once."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hpo.home import Home
from hpo.records import ModelVersion
from hpo.tracking import runs
from hpo.tracking.ledger import Opening
from hpo.tracking.models import delete_model
from hpo.tracking.registry import ORIGIN, fetch, resolve
from hpo.tracking.store import connect, load_mlflow, lock, shown, told

DIGEST = "hpo.model_digest"


@told
def copy_version(home: Home, version: ModelVersion, target: Home, *, looks: Sequence[Opening]) -> ModelVersion:
    """The version as the registry of `target` has it, copied there first where it has none with the same files.

    looks are the openings of the test part that measured it; each becomes a tag of the copy. No alias is touched.
    Raises StoreError, ModelError.
    """
    client = connect(home)
    source = client.get_model_version(version.name, str(version.version))
    run = client.get_run(version.run_id) if version.run_id else None
    with tempfile.TemporaryDirectory() as scratch, lock(target, "mlflow-copy"):
        folder = fetch(home, version, Path(scratch))
        digest = model_digest(folder)
        number = _known(target, version.name, digest)
        if number is None:
            tags = {
                **source.tags,
                DIGEST: digest,
                ORIGIN: source.tags.get(ORIGIN) or shown(home.tracking_uri),
                **{f"hpo.test_opening.{number}": json.dumps(asdict(look)) for number, look in enumerate(looks)},
            }
            number = _add(target, version.name, folder, tags, run)
    return resolve(target, f"{version.name}/{number}")


@told
def _known(target: Home, name: str, digest: str) -> int | None:
    """The number of the version with these files."""
    known = connect(target).search_model_versions(f"name = '{name}'", max_results=1000)
    return next((int(each.version) for each in known if each.tags.get(DIGEST) == digest), None)


@told
def _add(target: Home, name: str, folder: Path, tags: Mapping[str, str], origin: Any) -> int:
    """Log and register the model in folder; a run beside it has the parameters and scores of the run that made it."""
    load_mlflow()
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    client = connect(target)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    place = runs.experiment(client, target, name)
    run_id = client.create_run(place, tags={runs.KIND: "copy", **tags}, run_name=f"{name}, copied").info.run_id
    logged = None
    try:
        if origin is not None:
            metrics = runs.metrics(origin.data.metrics, time.time())
            runs.log(client, run_id, params=origin.data.params, metrics=metrics)
        logged = client.create_logged_model(place, name=name, source_run_id=run_id, tags=tags)
        with tempfile.TemporaryDirectory() as scratch:
            whole = shutil.copytree(folder, Path(scratch) / "model")
            # The same files, but for what says which model of which run they are.
            facts = Model.load(str(whole))
            facts.model_id = facts.model_uuid = logged.model_id
            facts.run_id = run_id
            facts.save(str(whole / "MLmodel"))
            client.log_model_artifacts(logged.model_id, str(whole))
        client.finalize_logged_model(logged.model_id, "READY")
        client.set_terminated(run_id)
        made = client.create_model_version(
            name,
            logged.artifact_location,
            run_id=run_id,
            tags=tags,
            model_id=logged.model_id,
            await_creation_for=0,  # as in registry
        )
    except BaseException:
        if logged is not None:
            delete_model(client, logged.model_id)
        client.delete_run(run_id)
        raise
    return int(made.version)


def model_digest(folder: Path) -> str:
    """sha256:... over the names and bytes of a model's files; MLmodel, which names where it was logged, is left out."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "MLmodel"):
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"
