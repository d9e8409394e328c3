"""Log an exported network as a whole MLflow model, and delete one with its files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

from hpo.errors import ModelError
from hpo.relocation import local_path
from hpo.tracking.run_metrics import is_result
from hpo.tracking.store import check_inside, is_missing, load_mlflow, pages, quiet

NET, CONFIG, SETUP, WEIGHTS = "net.pt2", "config.json", "setup.json", "weights.safetensors"
_LARGEST_EXAMPLE = 20_000  # values
# Logged with each model, whose script loads the program by it where there is no hpo.
_LOADER = {name: Path(__file__).parents[1] / "models" / f"{name}.py" for name in ("safe_loader", "interpreter")}


def warm_up() -> None:
    """Import mlflow and what log_model needs of it; the first call takes seconds."""
    load_mlflow()
    import mlflow.pyfunc  # noqa: F401

    # The first model that is logged reads the metadata of all installed packages; a later MLflow may do without.
    with suppress(ImportError):
        from mlflow.utils.requirements_utils import warn_dependency_requirement_mismatches

        warn_dependency_requirement_mismatches(_requirements())


def log_model(client: Any, run: Any, folder: Path) -> str:
    """Log folder's net.pt2, config.json and setup.json as the model of a run; returns models:/m-<id>.

    run is an mlflow.entities.Run whose metrics become the model's; one that has a model already keeps it. The model
    takes (n, height, width, channels), uint8 mostly, and needs torch, mlflow, numpy and pandas, not this package.
    Raises ModelError where a file is missing.
    """
    for name in (NET, CONFIG, SETUP):
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name}: no such file.", "Export the network there before it is logged.")
    load_mlflow()
    from mlflow.entities import LoggedModelOutput, Metric

    run_id = run.info.run_id
    for earlier in client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'"):
        if is_whole(earlier):
            return f"models:/{earlier.model_id}"
        delete_model(client, earlier.model_id)  # of a try that was cut short
    tags = {name: value for name, value in run.data.tags.items() if name.startswith("hpo.")}
    model = client.create_logged_model(
        run.info.experiment_id,
        name=f"trial-{run.data.tags['hpo.trial']}",
        source_run_id=run_id,
        tags=tags,
        params=run.data.params,
        model_type="image-classifier",
    )
    try:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            save_model(Path(scratch) / "model", folder, model_id=model.model_id, run_id=run_id, tags=tags)
            client.log_model_artifacts(model.model_id, str(Path(scratch) / "model"))
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        # The time of the run's own rows, so that MLflow sees the same rows again and adds none to the run.
        when = run.info.end_time or run.info.start_time
        scores = [
            Metric(name, value, when, 0, model_id=model.model_id, run_id=run_id)
            for name, value in run.data.metrics.items()
            if is_result(name)
        ]
        if scores:
            client.log_batch(run_id, metrics=scores)
        client.finalize_logged_model(model.model_id, "READY")
    except BaseException:
        delete_model(client, model.model_id)
        raise
    return f"models:/{model.model_id}"


def delete_unfinished(client: Any, experiment_id: str, uris: Mapping[str, str]) -> set[str]:
    """Delete what was logged for these runs and is not their whole model; returns the ids of the models that are left.

    uris maps run ids to models:/m-<id>, or "". It is what was left where a process was killed over a model.
    """
    left = set()
    for model in pages(client.search_logged_models, experiment_ids=[experiment_id], max_results=100):
        ours = "hpo.trial" in model.tags and model.source_run_id in uris
        unfinished = ours and (uris[model.source_run_id] != f"models:/{model.model_id}" or not is_whole(model))
        left |= {model.model_id} if not unfinished or not delete_model(client, model.model_id) else set()
    return left


def is_whole(model: Any) -> bool:
    """Whether all of a LoggedModel was logged, and its deletion has not begun."""
    place = local_path(model.artifact_location)
    return str(model.status) == "READY" and (place is None or (place / "MLmodel").is_file())


def delete_model(client: Any, model_id: str) -> bool:
    """Delete a logged model and, at once, its files; one that is gone already is no error.

    False where a registered version loads it: then it stays. If models are shared, the caller holds the lock
    mlflow-register, as for a registration.
    """
    from mlflow.exceptions import MlflowException

    try:
        model = client.get_logged_model(model_id)
    except MlflowException as error:
        if is_missing(error):
            return True
        raise
    place = model.artifact_location
    quote = '"' if "'" in place else "'"
    if client.search_model_versions(f"source_path = {quote}{place}{quote}", max_results=1):
        return False
    # Marked first: half of its files are never taken for a model. The record last: cut short, the next try finds it.
    client.finalize_logged_model(model_id, "FAILED")
    delete_artifacts(client, place)
    client.delete_logged_model(model_id)
    return True


def delete_artifacts(client: Any, uri: str, path: str | None = None) -> None:
    """Delete the files at a place of the artifact store, wherever that is."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    check_inside(client, uri)
    get_artifact_repository(uri, tracking_uri=client.tracking_uri).delete_artifacts(path)
    place = local_path(uri)
    if place is not None and path is None and place.parent.is_dir() and not any(place.parent.iterdir()):
        place.parent.rmdir()


def _uri(file: Path) -> str:
    """What MLflow finds a local file by: it reads %, ? and # of a plain path as an address would have them."""
    return file.absolute().as_uri() if set("%?#") & set(str(file)) else str(file)


def save_model(target: Path, folder: Path, *, model_id: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Write the MLflow model of folder's program, config and setup into target, a folder that is not there yet."""
    load_mlflow()
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import save_model as save_pyfunc
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec
    from numpy import dtype, zeros

    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    # Images in the values of the training data, where those are of one kind; the script scales them.
    kinds = list(config.get("ranges") or ())
    shape = config["image_shape"]
    images = TensorSpec(dtype(kinds[0] if len(kinds) == 1 else "uint8"), (-1, *shape))
    classes = [ColSpec(DataType.float, name) for name in config["class_names"]]
    artifacts = {"net": folder / NET, "config": folder / CONFIG, "setup": folder / SETUP, **_LOADER}
    # It would warn that there is no pip (uv needs none), and tell that it looks at the example.
    with quiet("mlflow.utils.environment", "mlflow.pyfunc"):
        save_pyfunc(
            str(target),
            python_model=str(Path(__file__).with_name("logged_model_script.py")),
            artifacts={name: _uri(file) for name, file in artifacts.items()},
            # Given, because inferring them loads the model in another process: seconds for each trial.
            pip_requirements=_requirements(),
            signature=ModelSignature(inputs=Schema([images]), outputs=Schema(classes)),
            # A black image: none of the data set leaves with the model. As text, a large one would be megabytes.
            input_example=zeros((1, *shape), images.type) if prod(shape) <= _LARGEST_EXAMPLE else None,
            metadata={"study": tags.get("hpo.study", ""), "trial": tags.get("hpo.trial", ""), **config},
            mlflow_model=Model(model_id=model_id, model_uuid=model_id, run_id=run_id),
        )


def _requirements() -> list[str]:
    """What the logged script imports, at the versions that are installed here."""
    return [f"{name}=={_public_version(name)}" for name in ("mlflow", "numpy", "pandas", "torch")]


def _public_version(package: str) -> str:
    # torch 2.9.0+cpu is not on an index under that name; 2.9.0 is.
    return version(package).partition("+")[0]
