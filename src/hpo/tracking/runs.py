"""Records of a study as MLflow entities: tags, parameters, metrics and files of runs, and how its runs are found."""

from __future__ import annotations

import getpass
import json
import math
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.home import Home
from hpo.records import Candidate, DataCard, Epoch, StudyResult, TrialResult, TrialState
from hpo.spec.study import Setup
from hpo.tracking.store import connect, is_missing, pages, translate_errors

if TYPE_CHECKING:
    from numpy.typing import NDArray

PARENT = "mlflow.parentRunId"
KIND = "hpo.kind"
STUDY = "hpo.study"
CREATED = "hpo.created"
TRIAL = "hpo.trial"
STATE = "hpo.state"
FAILURE = "hpo.failure"
MODEL = "hpo.model"
DIGEST = "hpo.data_digest"

# Pruned is a normal end; stopped is not one.
STATUS: Mapping[TrialState, str] = {
    TrialState.COMPLETE: "FINISHED",
    TrialState.PRUNED: "FINISHED",
    TrialState.FAILED: "FAILED",
    TrialState.STOPPED: "KILLED",
}
_PACKAGES = ("hpo", "mlflow", "numpy", "optuna", "scikit-learn", "timm", "torch", "torchvision")
_OTHER = re.compile(r"[^\w\- ]")  # what a class name may hold and the name of a metric may not
_ITEMS_PER_REQUEST = {"metrics": 900, "params": 100, "tags": 100}  # MLflow takes 1000 in all, 100 of the latter two


def environment_tags() -> dict[str, str]:
    """The user, the git commit of the working directory and the versions of packages, as tags."""
    tags = {"mlflow.user": user(), "version.python": platform.python_version()}
    for package in _PACKAGES:
        try:
            tags[f"version.{package}"] = version(package)
        except PackageNotFoundError:
            continue
    commit = _git_commit()
    if commit:
        tags["mlflow.source.git.commit"] = commit.removesuffix("-dirty")
        tags["hpo.git_dirty"] = str(commit.endswith("-dirty")).lower()
    return tags


def user() -> str:
    """The user's login name, or unknown where the system has none for it, as in some containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def _git_commit() -> str:
    git = shutil.which("git")
    if not git:
        return ""
    # --exclude: never the name of a tag in place of the commit.
    command = [git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def study_tags(study: StudyResult) -> dict[str, str]:
    """Tags that identify one generation of a study, even where its name was reused after a deletion."""
    return {STUDY: study.title, KIND: "study", CREATED: repr(study.created)}


def trial_tags(candidate: Candidate, parent: Any, worker: str) -> dict[str, str]:
    """Tags of a trial's run; parent is the study's Run."""
    tags = {
        PARENT: parent.info.run_id,
        KIND: "trial",
        STUDY: parent.data.tags[STUDY],
        TRIAL: str(candidate.number),
        STATE: TrialState.RUNNING.value,
        "hpo.ordinal": str(candidate.ordinal),
        "hpo.attempt": str(candidate.attempt),
        "hpo.worker": worker,
    }
    return tags | ({"hpo.stage": candidate.stage} if candidate.stage else {})


def trial_params(candidate: Candidate, setup: Setup | None) -> dict[str, Any]:
    """Every effective parameter: all values of the spec by their dotted path, and the seed of the trial.

    Without a setup, of values that do not fit together, those that were drawn.
    """
    values = setup.flat() if setup else candidate.parameters
    params = {path: value for path, value in values.items() if value is not None}
    return {**params, "seed": candidate.seed}


def metrics(values: Mapping[str, float], when: float, *, step: int = 0) -> list[Any]:
    """mlflow Metrics of one step; when is in seconds since 1970."""
    from mlflow.entities import Metric

    return [Metric(stored_name(name), float(value), int(when * 1000), step) for name, value in values.items()]


def stored_name(score: str) -> str:
    """A score's name as MLflow takes it: valid_recall[cat] -> valid_recall/cat; other signs in hexadecimal."""
    return re.sub(
        r"\[([^\[\]]+)\](.*)",
        lambda match: (
            "/" + _OTHER.sub(lambda letter: f":{ord(letter[0]):x}:", match[1]) + (match[2] and f"/{match[2]}")
        ),
        score,
    )


def score_name(stored: str) -> str:
    """The score's name that stored_name turned into this one."""
    name, slash, rest = stored.partition("/")
    if not slash:
        return stored
    inside, _, after = rest.partition("/")
    return f"{name}[{re.sub(':([0-9a-f]+):', lambda match: chr(int(match[1], 16)), inside)}]{after}"


def epoch_metrics(epochs: Sequence[Epoch], ended: float) -> list[Any]:
    """mlflow Metrics of epochs, the last of which ended at this time (seconds since 1970); one step per epoch.

    Folds after the first have names of their own: fold1.valid_loss, ...
    """
    found: list[Any] = []
    for epoch in reversed(epochs):
        prefix = f"fold{epoch.fold}." if epoch.fold else ""
        values = {**epoch.scores, "learning_rate": epoch.learning_rate, "epoch_seconds": epoch.seconds}
        found += metrics({prefix + name: value for name, value in values.items()}, ended, step=epoch.number)
        ended -= epoch.seconds
    return found[::-1]


def result_metrics(result: TrialResult, ended: float) -> list[Any]:
    """mlflow Metrics of an ended trial: best_<score>, objective, duration and size, and its system metrics."""
    values: dict[str, float] = {f"best_{name}": value for name, value in result.scores.items()}
    values |= {"duration_seconds": result.seconds}
    if result.best_epoch:
        values["best_epoch"] = result.best_epoch
    if result.parameter_count:
        values["parameter_count"] = result.parameter_count
    if result.value is not None:
        values["objective"] = result.value
    if result.profile is not None:
        values |= {f"profile.{phase}_seconds": seconds for phase, seconds in result.profile.seconds.items()}
    return metrics(values, ended) + system_metrics(result)


def system_metrics(result: TrialResult) -> list[Any]:
    """mlflow Metrics that its UI shows as system metrics; one step for each time at which they were taken."""
    times = result.system.get("time", ())
    columns = {f"system/{name}": column for name, column in result.system.items() if name != "time"}
    return [
        metric
        for step, when in enumerate(times)
        for metric in metrics({name: column[step] for name, column in columns.items()}, when, step=step)
    ]


def scores_of(metrics: Mapping[str, float]) -> dict[str, float]:
    """The scores among a trial run's metrics: valid_accuracy, ..."""
    return {
        score_name(name.removeprefix("best_")): value
        for name, value in metrics.items()
        if name.startswith("best_") and name != "best_epoch" and math.isfinite(value)
    }


# The files of the run of every trial: path among its artifacts -> content, a text for .txt and else JSON, or None.
# The tracker writes them, and hpo doctor misses and restores them.
TRIAL_FILES: Mapping[str, Callable[[TrialResult], Any]] = {
    "confusion.json": lambda result: {"true_by_predicted": result.confusion} if result.confusion else None,
    "traceback.txt": lambda result: result.traceback or None,
}
REPORT, FIGURES = "report", "figures"  # artifact folders of a trial that keeps its model: tables and figures


def trial_files(result: TrialResult) -> dict[str, Any]:
    """Path -> content of the files that the run of an ended trial has."""
    contents = {path: content(result) for path, content in TRIAL_FILES.items()}
    return {path: content for path, content in contents.items() if content is not None}


def study_files(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Path -> content of the files of a study's run that follow from its spec."""
    return {"study.yaml": dict(spec)}


def log_files(client: Any, run_id: str, files: Mapping[str, Any]) -> None:
    """Write such files to a run, over earlier ones."""
    for path, content in files.items():
        if path.endswith(".txt"):
            client.log_text(run_id, content, path)
        else:
            client.log_dict(run_id, content, path)


def dataset_input(data: DataCard) -> Any:
    """The mlflow DatasetInput of a data set; its digest is cut to the 36 characters that MLflow takes."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    kind = "http" if data.source.startswith(("http://", "https://")) else "local"
    dataset = Dataset(
        name=data.name,
        digest=data.digest.removeprefix("sha256:")[:36],
        source_type=kind,
        source=json.dumps({"url" if kind == "http" else "uri": data.source}),
        profile=json.dumps({"images": data.development_count, "image_shape": data.image_shape, "digest": data.digest}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def log(
    client: Any,
    run_id: str,
    *,
    metrics: Sequence[Any] = (),
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Log everything in as few requests as MLflow's limits allow."""
    from mlflow.entities import Param, RunTag

    waiting: dict[str, list[Any]] = {
        "metrics": list(metrics),
        "params": [Param(name, str(value)) for name, value in (params or {}).items()],
        "tags": [RunTag(name, value) for name, value in (tags or {}).items()],
    }
    while any(waiting.values()):
        now = {kind: items[: _ITEMS_PER_REQUEST[kind]] for kind, items in waiting.items()}
        if len(now["params"]) + len(now["tags"]) > 100:
            now["metrics"] = now["metrics"][:800]
        client.log_batch(run_id, **now)
        waiting = {kind: items[len(now[kind]) :] for kind, items in waiting.items()}


def find_parent(client: Any, study: StudyResult, *, deleted: bool = False) -> Any | None:
    """The Run of a study's generation, the oldest if several were made; None where it has none.

    deleted: among those that somebody has deleted in MLflow.
    """
    from mlflow.entities import ViewType

    experiment = client.get_experiment_by_name(study.name)
    if experiment is None:
        return None
    wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in study_tags(study).items())
    view = ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY
    found = client.search_runs([experiment.experiment_id], wanted, view, order_by=["start_time ASC"], max_results=1)
    return found[0] if found else None


def experiment(client: Any, home: Home, name: str) -> str:
    """The id of the experiment of this name, created or restored if necessary."""
    found = client.get_experiment_by_name(name)
    if found is None:
        # Without a location, an embedded store would write to the current working directory.
        location = (home.artifacts / name).as_uri() if home.embedded else None
        return str(client.create_experiment(name, artifact_location=location))
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def artifact(client: Any, run_id: str, path: str, folder: str) -> Path | None:
    """The local file of a run's artifact, its own or a copy in `folder`; None where the run has none."""
    listed = client.list_artifacts(run_id, path.rpartition("/")[0] or None)
    if path not in [file.path for file in listed]:
        return None
    return Path(client.download_artifacts(run_id, path, folder))


def children(client: Any, parent: Any, wanted: str = "", *, deleted: bool = False) -> Iterator[Any]:
    """The mlflow Runs of a study's trials; wanted restricts them in MLflow's filter language.

    deleted: those that somebody has deleted in MLflow, and may restore, in place of the others.
    """
    from mlflow.entities import ViewType

    view = ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY
    query = " and ".join(filter(None, [f"tags.`{PARENT}` = '{parent.info.run_id}'", wanted]))
    experiment = [parent.info.experiment_id]
    return pages(
        client.search_runs, experiment_ids=experiment, filter_string=query, run_view_type=view, max_results=1000
    )


@translate_errors
def validation_predictions(home: Home, run_id: str) -> dict[str, NDArray[Any]] | None:
    """What a trial with a kept model predicted; None where its run has no such file.

    rows (n,) are of the development images, labels (n,) their classes, probabilities (n, classes) the predictions.
    """
    import numpy as np
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as folder:
        try:
            file = artifact(connect(home), run_id, f"{REPORT}/validation.npz", folder) if run_id else None
        except MlflowException as error:
            if not is_missing(error):
                raise
            return None
        if file is None:
            return None
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
