"""Records of a study as MLflow entities: tags, parameters, metrics and files of runs, and how its runs are found."""

from __future__ import annotations

import getpass
import json
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.distribution import VERSION
from hpo.home import Home
from hpo.metrics import label_of
from hpo.records import ENSEMBLE, Candidate, DataCard, StudyResult, TrialResult, TrialState
from hpo.tracking.run_metrics import OBJECTIVE
from hpo.tracking.store import connect, is_missing, pages, passing_over, translate_errors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hpo.spec.study import Setup

PARENT = "mlflow.parentRunId"
KIND = "hpo.kind"
STUDY = "hpo.study"
CREATED = "hpo.created"
TRIAL = "hpo.trial"
STATE = "hpo.state"
FAILURE = "hpo.failure"
MODEL = "hpo.model"
DIGEST = "hpo.data_digest"
MEMBERS = "hpo.members"  # of an ensemble: its trials, and how often each counts
QUESTION = "hpo.question"
NOTE, NAME = "mlflow.note.content", "mlflow.runName"  # the description and the name of a run, as MLflow keeps them
MACHINE = "machine."  # tags of a trial's run: what the machine decided, as its device and precision

VIEW = "mlflow.sharedViewState."  # tags of an experiment: the state of its page that an address names
_LONGEST_VIEW = 5000  # characters that MLflow takes
_EXPERIMENT_KIND = "mlflow.experimentKind"  # without it MLflow guesses, and opens a study on traces of chatbots

# Pruned is a normal end; stopped is not one.
STATUS: Mapping[TrialState, str] = {
    TrialState.COMPLETE: "FINISHED",
    TrialState.PRUNED: "FINISHED",
    TrialState.FAILED: "FAILED",
    TrialState.STOPPED: "KILLED",
}
PAUSED = "SCHEDULED"  # the status of a trial's run that may go on
_PACKAGES = ("mlflow", "numpy", "optuna", "scikit-learn", "timm", "torch", "torchvision")
_ITEMS_PER_REQUEST = {"metrics": 900, "params": 100, "tags": 100}  # MLflow takes 1000 in all, 100 of the latter two


def environment_tags(study: str) -> dict[str, str]:
    """The command, the user, the git commit of the working directory and the versions of packages, as tags."""
    tags = {"mlflow.user": user(), "version.hpo": VERSION, "version.python": platform.python_version()}
    tags |= {"mlflow.source.type": "LOCAL", "mlflow.source.name": f"hpo run {study}"}
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
    """The searched values as they are used, by their dotted path in the order of the space, and the trial's seed.

    All other values are in study.yaml of the study's run. Without a setup, of values that do not fit together, those
    that were drawn.
    """
    used = setup.flat() if setup else {}
    params: dict[str, Any] = {}
    for path, drawn in candidate.parameters.items():
        inside = {place: value for place, value in used.items() if place.startswith(f"{path}.") and value is not None}
        params |= inside or {path: used.get(path, drawn)}
    return {**params, "seed": candidate.seed}


def trial_note(candidate: Candidate, study: StudyResult, setup: Setup | None) -> str:
    """The description of a trial's run, in Markdown: what is tried, and how to look into it."""
    facts = [f"Trial {candidate.number} of {study.title}"]
    facts += [f"stage {candidate.stage}"] if candidate.stage else []
    facts += [f"attempt {candidate.attempt}"] if candidate.attempt > 1 else []
    again = f"To train it again: `hpo rerun {study.exact}#{candidate.number}`" * (candidate.stage != ENSEMBLE)
    return "\n".join([f"{', '.join(facts)}.", "", *_table(trial_params(candidate, setup)), "", again])


def members_text(members: Mapping[str, int]) -> str:
    """The members of an ensemble, most frequent first: digits-mlp~1#3 x2, digits-mlp~1#7."""
    ordered = sorted(members.items(), key=lambda member: -member[1])
    return ", ".join(f"{name} x{count}" if count > 1 else name for name, count in ordered)


def version_note(study: StudyResult, run: Any) -> str:
    """The description of a registered version, in Markdown; run is that of its trial."""
    number, value = run.data.tags[TRIAL], run.data.metrics.get(OBJECTIVE)
    score = f": {label_of(study.objective)} {value:.4f} on the validation images" if value is not None else ""
    use = f"To use it: `hpo predict {study.name} IMAGE`"
    members = run.data.tags.get(MEMBERS)
    what = "weights" if run.data.tags.get(f"{MACHINE}average") == "weights" else "probabilities"
    of = [f"An ensemble: the mean of the {what} of {members}.", ""] if members else []
    return "\n".join([f"Trial {number} of {study.title}{score}.", "", *of, *_table(run.data.params), "", use])


def _table(values: Mapping[str, Any]) -> list[str]:
    rows = [f"| {name} | {value} |" for name, value in values.items()]
    return ["| parameter | value |", "|---|---|", *rows]


def result_name(result: TrialResult) -> str:
    """The name of an ended trial's run, with its result: 13 · 0.9896, 18 · pruned."""
    if result.state is not TrialState.COMPLETE or result.value is None:
        return f"{result.number} · {result.state.value}"
    usual = 1e-3 <= abs(result.value) < 1e4
    return f"{result.number} · {result.value:{'.4f' if usual else '.4g'}}"


# The files of the run of every trial: path among its artifacts -> content, a text for .txt and else JSON, or None.
# The tracker writes them, and hpo doctor misses and restores them.
TRIAL_FILES: Mapping[str, Callable[[TrialResult], Any]] = {
    "confusion.json": lambda result: {"true_by_predicted": result.confusion} if result.confusion else None,
    "traceback.txt": lambda result: result.traceback or None,
}
REPORT, FIGURES = "report", "figures"  # artifact folders of a trial that keeps its model: tables and figures
PREDICTIONS = f"{REPORT}/validation.npz"


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


def unlogged(client: Any, run: Any, metrics: Sequence[Any]) -> list[Any]:
    """Those of the metrics that a run has not, at their step."""
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in {each.key for each in metrics}}
    logged = {(name, point.step) for name, history in histories.items() for point in history}
    return [metric for metric in metrics if (metric.key, metric.step) not in logged]


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
        with passing_over("RESOURCE_ALREADY_EXISTS"):
            client.create_experiment(name, artifact_location=location)
        found = client.get_experiment_by_name(name)
    if found.lifecycle_stage == "deleted":
        with passing_over("RESOURCE_DOES_NOT_EXIST"):  # among the deleted ones
            client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def describe_experiment(client: Any, experiment_id: str, study: StudyResult, question: str) -> None:
    """Let MLflow open an experiment on its training runs, and describe it by the study's question.

    What a user has chosen or written there stays. The address of `hpo ui` names the view of this generation's trials.
    """
    tags = client.get_experiment(experiment_id).tags
    kind = tags.get(_EXPERIMENT_KIND, "")
    wanted = {_EXPERIMENT_KIND: "custom_model_development"} if not kind or "inferred" in kind else {}
    if question and tags.get(NOTE, "") in ("", tags.get(QUESTION)):
        wanted |= {NOTE: question, QUESTION: question}
    wanted[f"{VIEW}{view_key(study)}"] = json.dumps(trials_view(study))
    for name, value in wanted.items():
        if tags.get(name) != value and len(value) <= _LONGEST_VIEW:
            client.set_experiment_tag(experiment_id, name, value)


def view_key(study: StudyResult) -> str:
    """What names the view of a generation's trials in the address of an experiment's page."""
    return f"trials-{study.generation}"


def trials_filter(study: StudyResult) -> str:
    """The trials of a generation in MLflow's filter language."""
    return f"tags.`{KIND}` = 'trial' and tags.`{STUDY}` = '{study.title}'"


def trials_view(study: StudyResult) -> dict[str, Any]:
    """The state of an experiment's page as MLflow shares it, so far as it is not MLflow's own.

    It lists the trials, best first, with the objective and the searched values in the order of the space.
    """
    return {
        "searchFilter": trials_filter(study),
        "orderByKey": f"metrics.`{OBJECTIVE}`",
        "orderByAsc": study.direction == "minimize",
        "selectedColumns": [f"metrics.`{OBJECTIVE}`", *(f"params.`{path}`" for path in searched_paths(study.spec))],
    }


def searched_paths(spec: Mapping[str, Any]) -> list[str]:
    """The places that a study varies, in the order of its space and its stages."""
    search = spec.get("search") or {}
    spaces = [search.get("space") or {}, *(stage.get("space") or {} for stage in search.get("stages") or ())]
    return list(dict.fromkeys(path for space in spaces for path in space))


def artifact(client: Any, run_id: str, path: str, folder: str) -> Path | None:
    """The local file of a run's artifact, its own or a copy in `folder`; None where the run has none."""
    listed = client.list_artifacts(run_id, path.rpartition("/")[0] or None)
    if path not in [file.path for file in listed]:
        return None
    return Path(client.download_artifacts(run_id, path, folder))


def program_scores(client: Any, run_id: str) -> dict[str, float]:
    """The validation scores of a kept program that answers otherwise than its network does; {} of any other."""
    with tempfile.TemporaryDirectory() as folder:
        file = artifact(client, run_id, f"{REPORT}/answers.json", folder)
        decided = json.loads(file.read_text(encoding="utf-8")) if file is not None else {}
    return dict(decided.get("program", {}).get("scores", {}))


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
            file = artifact(connect(home), run_id, PREDICTIONS, folder) if run_id else None
        except MlflowException as error:
            if not is_missing(error):
                raise
            return None
        if file is None:
            return None
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
