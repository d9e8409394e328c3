"""MLflow as the projection of a study: one parent run a generation, one child run a trial, mended at any time."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hpo.errors import ModelError, SpecError, StoreError
from hpo.events import StudyProfiled
from hpo.home import Home
from hpo.locks import lock
from hpo.records import Candidate, DataCard, Epoch, ModelVersion, SplitCard, StudyResult, Trial, TrialResult, TrialState
from hpo.spec.study import Setup, StudySpec
from hpo.tracking import models, registry, runs
from hpo.tracking.champions import ensemble_stays
from hpo.tracking.reader import as_run, trial_runs
from hpo.tracking.run_metrics import epoch_metrics, metrics_at, result_metrics, scores_of, study_metrics
from hpo.tracking.store import connect, pages, translate_errors


class Tracker:
    """Writes one study to MLflow with explicit run ids; for one thread at a time.

    open_study comes first; then a trial is start_trial, log_epochs, end_trial and, if it is good, keep_model. Every
    method raises StoreError where the store or the disk refuses, StoreAwayError where a later try may work. A method
    called again, with the same times, writes nothing twice. Nothing is written, and mlflow is not imported, before the
    first call.
    """

    def __init__(self, home: Home) -> None:
        self.home = home
        self._study: StudyResult | None = None
        self._parent: Any = None
        self._runs: dict[int, str] = {}
        self._shared: dict[str, str] = {}
        self._dataset: Any = None

    @property
    def _client(self) -> Any:
        return connect(self.home)

    @translate_errors
    def open_study(self, study: StudyResult, spec: StudySpec, data: DataCard, split: SplitCard) -> None:
        """Make or continue the study's parent run, with its spec, data set, split, commit and versions."""
        client = self._client
        self._study = replace(study, trials=())
        self._shared = {**runs.environment_tags(study.name), runs.DIGEST: data.digest}
        self._dataset = runs.dataset_input(data)
        self._runs = {}
        # Two supervisors that open one study at once must end with one parent run.
        with lock(self.home, "mlflow-open"):
            experiment_id = runs.experiment(client, self.home, study.name)
            runs.describe_experiment(client, experiment_id, study, spec.question)
            parent = runs.find_parent(client, study)
            if parent is None and (trashed := runs.find_parent(client, study, deleted=True)) is not None:
                # As with a deleted experiment: the runs of its trials name it, and a second one would have none.
                client.restore_run(trashed.info.run_id)
                parent = client.get_run(trashed.info.run_id)
            if parent is None:
                parent = client.create_run(
                    experiment_id,
                    start_time=int(study.created * 1000),
                    tags=runs.study_tags(study),
                    run_name=study.title,
                )
            else:
                client.update_run(parent.info.run_id, status="RUNNING")
        self._parent = parent
        run_id = parent.info.run_id
        shown = {runs.QUESTION: spec.question, runs.NOTE: parent.data.tags.get(runs.NOTE) or spec.question}
        runs.log(client, run_id, tags={**self._shared, **{name: text for name, text in shown.items() if text}})
        client.log_inputs(run_id, [self._dataset])
        runs.log_files(client, run_id, runs.study_files(spec.model_dump(mode="json")))
        client.log_dict(run_id, {"data": asdict(data), "split": asdict(split)}, "data.json")

    @translate_errors
    def start_trial(
        self, candidate: Candidate, setup: Setup | None, *, worker: str, started: float | None = None
    ) -> None:
        """Make the trial's run, with every effective parameter; started is in seconds since 1970, now by default."""
        self._start(candidate, setup, worker=worker, started=started or time.time())

    @translate_errors
    def log_epochs(self, number: int, epochs: Sequence[Epoch], *, ended: float = 0.0) -> None:
        """Add epochs of a trial, in one batch; its steps are epoch numbers. ended: when the last was over, else now."""
        if epochs:
            runs.log(self._client, self._run_id(number), metrics=epoch_metrics(epochs, ended or time.time()))

    @translate_errors
    def log_missing(self, result: TrialResult) -> None:
        """Add those epochs of a trial that its run has not."""
        run = self._client.get_run(self._run_id(result.number))
        metrics = runs.unlogged(self._client, run, epoch_metrics(result.epochs, result.ended or time.time()))
        runs.log(self._client, run.info.run_id, metrics=metrics)

    @translate_errors
    def pause_trial(self, result: TrialResult) -> None:
        """Add the epochs of a trial that is paused; its run stays open."""
        self.log_missing(result)
        tags = {runs.STATE: result.state.value, "hpo.pauses": str(result.pauses)}
        runs.log(self._client, self._run_id(result.number), tags=tags)
        self._client.update_run(self._run_id(result.number), status=runs.PAUSED)

    @translate_errors
    def end_trial(self, result: TrialResult) -> None:
        """Write how a trial ended and close its run: FINISHED (complete, pruned), FAILED or KILLED (stopped)."""
        ended = result.ended or time.time()
        self._end(result, result_metrics(result, ended), ended=ended)

    @translate_errors
    def keep_model(self, number: int, folder: Path) -> str:
        """Log the model of an ended trial and the tables next to it; returns models:/m-<id>.

        folder holds net.pt2 and config.json (class_names, image_shape). A model that the trial has already is returned
        as it is. Raises ModelError where a file is missing.
        """
        client, run = self._client, self._client.get_run(self._run_id(number))
        if (uri := str(run.data.tags.get(runs.MODEL, ""))) in self._whole(run.info.experiment_id):
            return uri
        for path in sorted(folder.iterdir()):
            # The model has the first two, and the weights within the first.
            if path.is_file() and path.name not in (models.NET, models.CONFIG, models.SETUP, models.WEIGHTS):
                client.log_artifact(run.info.run_id, str(path), runs.REPORT)
        uri = models.log_model(client, run, folder)
        client.set_tag(run.info.run_id, runs.MODEL, uri)
        return uri

    @translate_errors
    def log_figures(self, number: int, folder: Path) -> None:
        """Log the pictures in folder, as those of a trial."""
        self._client.log_artifacts(self._run_id(number), str(folder), runs.FIGURES)

    @translate_errors
    def drop_model(self, number: int, study: StudyResult | None = None) -> None:
        """Delete the model of a trial, its pictures and tables, from the disk too; a registered model stays."""
        client, run = self._client, self._client.get_run(self._run_id(number, study))
        uri = run.data.tags.get(runs.MODEL)
        if uri is None or client.search_model_versions(f"run_id = '{run.info.run_id}'", max_results=1):
            return
        with lock(self.home, "mlflow-register"):  # another supervisor may be about to register it
            if not models.delete_model(client, uri.removeprefix("models:/")):
                return
        for part in (runs.REPORT, runs.FIGURES):
            self._drop(run, part)
        client.delete_tag(run.info.run_id, runs.MODEL)

    @translate_errors
    def drop_figures(self, number: int, study: StudyResult | None = None) -> None:
        """Delete the pictures of a trial, from the disk too; without any this does nothing."""
        self._drop(self._client.get_run(self._run_id(number, study)), runs.FIGURES)

    @translate_errors
    def register(self, study: StudyResult, number: int) -> ModelVersion:
        """Register a trial's kept model under the study's name, as `challenger` unless it is the champion.

        The same trial twice is one version. An ensemble of the study that is challenger, or champion, outlasts
        a trial that is older, or of the search and no better. Raises ModelError where the trial's model was not kept.
        """
        run = self._client.get_run(self._run_id(number, study))
        uri = run.data.tags.get(runs.MODEL)
        if uri is None:
            raise ModelError(
                f"{study.title}: the model of trial {number} was not kept.", "Keep some: --keep-models best:10"
            )
        tags = {"hpo.study": study.title, "hpo.trial": str(number), runs.DIGEST: study.data_digest}
        tags |= {name: run.data.tags[name] for name in (runs.MEMBERS,) if name in run.data.tags}
        return registry.register(
            self.home,
            study.name,
            uri,
            run_id=run.info.run_id,
            tags=tags,
            scores=scores_of(run.data.metrics) | runs.program_scores(self._client, run.info.run_id),
            description=runs.version_note(study, run),
            question=str(study.spec.get("question", "")),
            challenger=not ensemble_stays(self.home, study, number),
        )

    @translate_errors
    def close_study(self, study: StudyResult, *, status: str, summary: str, figures: Sequence[Path] = ()) -> None:
        """Write the best trial, counts, summary (Markdown) and figures (files); status is FINISHED or KILLED.

        Figures of an earlier closing that were not drawn again are deleted: they would show another state.
        """
        client, run_id = self._client, self._parent_of(study).info.run_id
        best = study.best
        tags = {runs.NOTE: summary}
        if best is not None:
            tags |= {"hpo.best_trial": str(best.number)}
            tags |= {f"best.{path}": str(value) for path, value in best.candidate.parameters.items()}
        # A resumed study closes again: its step is the number of trials that had ended by then.
        step = study.count(*(state for state in TrialState if state.finished))
        # The time of what it sums up: closed twice in one state, it says so once.
        ended = max((trial.started + trial.run_seconds for trial in study.trials), default=study.created)
        values = metrics_at(study_metrics(study), ended, step=step)
        runs.log(client, run_id, metrics=values, tags=tags)
        client.log_text(run_id, summary, "summary.md")
        drawn = {f"{runs.FIGURES}/{path.name}" for path in figures}
        for earlier in client.list_artifacts(run_id, runs.FIGURES):
            if earlier.path not in drawn:
                models.delete_artifacts(client, self._parent_of(study).info.artifact_uri, earlier.path)
        for path in figures:
            client.log_artifact(run_id, str(path), runs.FIGURES)
        # It lasts until its last trial ended, however often it is closed after that.
        client.set_terminated(run_id, status, end_time=int(ended * 1000))

    @translate_errors
    def log_profile(self, study: StudyResult, profile: StudyProfiled) -> None:
        """Write where a run's time went to profile.json of the study's run."""
        self._client.log_dict(self._parent_of(study).info.run_id, asdict(profile), "profile.json")

    @translate_errors
    def reconcile(self, study: StudyResult, spec: StudySpec, *, leave: Collection[int] = ()) -> None:
        """Bring the runs in line with the study storage: missing ones made, unfinished ones ended as the trials did.

        What a killed process had begun to log of a model is deleted. Trials that are waiting or running are left alone,
        and so are those in `leave`: another supervisor may be about to write them. A run that somebody has deleted in
        MLflow stays deleted: it can be restored, and a second one would hide that.
        """
        deleted = self.deleted_runs(study)
        found = {int(run.tags[runs.TRIAL]): run for run in trial_runs(self.home, as_run(self._parent_of(study)))}
        self._runs.update({number: run.id for number, run in found.items()})
        ended: dict[str, str] = {}
        for trial in study.trials:
            run = found.pop(trial.number, None)
            if trial.state is TrialState.PAUSED and trial.number not in {*leave, *deleted}:
                self._mend_paused(trial, spec, run)
            if trial.state not in runs.STATUS or trial.number in leave or (run is None and trial.number in deleted):
                continue
            if run is not None:
                ended[run.id] = run.tags.get(runs.MODEL, "")
            if run is None or run.status == "RUNNING" or run.tags.get(runs.STATE) != trial.state:
                self._mend(trial, spec, self._client.get_run(run.id) if run else None)
        # Trials that the storage has not: newer than this record (left alone), or lost with an earlier storage.
        newest = max((trial.number for trial in study.trials), default=-1)
        for number, run in found.items():
            if number <= newest and run.status == "RUNNING":
                self._client.set_tag(run.id, runs.STATE, TrialState.STOPPED.value)
                self._client.set_terminated(run.id, "KILLED")
        with lock(self.home, "mlflow-register"):
            left = models.delete_unfinished(self._client, self._parent.info.experiment_id, ended)
        for run_id, uri in ended.items():
            if uri and uri.removeprefix("models:/") not in left:  # killed between model and tag
                self._client.delete_tag(run_id, runs.MODEL)

    @translate_errors
    def require_run(self, study: StudyResult, number: int) -> None:
        """Raise StoreError where a trial has no run, or one that somebody has deleted."""
        self._run_id(number, study)

    @translate_errors
    def deleted_runs(self, study: StudyResult) -> dict[int, str]:
        """Trial number -> id of its run, of the trials whose only run somebody has deleted in MLflow."""
        parent = self._parent_of(study)
        found = {
            int(run.data.tags[runs.TRIAL]): run.info.run_id for run in runs.children(self._client, parent, deleted=True)
        }
        if found:
            for run in trial_runs(self.home, as_run(parent)):
                found.pop(int(run.tags[runs.TRIAL]), None)
        return found

    @translate_errors
    def kept_models(self, study: StudyResult) -> dict[int, str]:
        """Trial number -> models:/m-<id>, of the trials whose model is on disk."""
        return {number: run.data.tags[runs.MODEL] for number, run in self._kept_runs(study).items()}

    def _kept_runs(self, study: StudyResult) -> dict[int, Any]:
        parent = runs.find_parent(self._client, study)
        if parent is None:
            return {}
        tagged = runs.children(self._client, parent, f"tags.`{runs.MODEL}` LIKE 'models:%'")
        kept = {int(run.data.tags[runs.TRIAL]): run for run in tagged}
        whole = self._whole(parent.info.experiment_id) if kept else set()
        return {number: run for number, run in kept.items() if run.data.tags[runs.MODEL] in whole}

    @translate_errors
    def kept_predictions(
        self, study: StudyResult, numbers: Collection[int], folder: Path
    ) -> dict[int, tuple[str, Path]]:
        """Number -> models:/m-<id> and the file of validation predictions, of those trials that have both.

        Files of a server are copied into folder. runs.validation_predictions says what is in them.
        """
        found: dict[int, tuple[str, Path]] = {}
        for number, run in self._kept_runs(study).items():
            if number in numbers:
                (folder / str(number)).mkdir(parents=True, exist_ok=True)
                file = runs.artifact(self._client, run.info.run_id, runs.PREDICTIONS, str(folder / str(number)))
                found |= {number: (run.data.tags[runs.MODEL], file)} if file is not None else {}
        return found

    @translate_errors
    def model_files(self, uri: str, folder: Path) -> Path:
        """The folder of the files of a logged model, models:/m-<id>; of a server's, a copy in folder."""
        return registry.fetch(self.home, registry.resolve(self.home, uri), folder) / "artifacts"

    def _whole(self, experiment: str) -> set[str]:
        """models:/m-<id> of each whole model of an experiment."""
        every = pages(self._client.search_logged_models, experiment_ids=[experiment], max_results=100)
        return {f"models:/{model.model_id}" for model in every if models.is_whole(model)}

    def _drop(self, run: Any, part: str) -> None:
        if self._client.list_artifacts(run.info.run_id, part):
            models.delete_artifacts(self._client, run.info.artifact_uri, part)

    def _parent_of(self, study: StudyResult) -> Any:
        if self._parent is None or not runs.study_tags(study).items() <= self._parent.data.tags.items():
            self._parent, self._runs = runs.find_parent(self._client, study), {}
        if self._parent is None:
            raise StoreError(f"{study.title}: MLflow has no run of this study.", f"Run it: hpo run {study.name}")
        return self._parent

    def _run_id(self, number: int, study: StudyResult | None = None) -> str:
        if study is not None:
            self._parent_of(study)
        if number not in self._runs and not self._find(number):
            for run in runs.children(self._client, self._parent, f"tags.`{runs.TRIAL}` = '{number}'", deleted=True):
                raise StoreError(
                    f"the run of trial {number} was deleted in MLflow.",
                    f"Bring it back: mlflow runs restore --run-id {run.info.run_id}",
                )
            raise StoreError(f"MLflow has no run of trial {number}.", "Run the study again: it mends its runs.")
        return self._runs[number]

    def _find(self, number: int) -> Any | None:
        for run in runs.children(self._client, self._parent, f"tags.`{runs.TRIAL}` = '{number}'"):
            self._runs[number] = run.info.run_id
            return run
        return None

    def _start(self, candidate: Candidate, setup: Setup | None, *, worker: str, started: float) -> None:
        client, parent, number = self._client, self._parent, candidate.number
        # An earlier try may have made it before its answer was lost, or another supervisor that mended the study.
        if (found := self._find(number)) is not None and found.info.status == runs.PAUSED:
            runs.log(client, found.info.run_id, tags={runs.STATE: TrialState.RUNNING.value, "hpo.worker": worker})
            client.update_run(found.info.run_id, status="RUNNING")
        elif found is None:
            run = client.create_run(
                parent.info.experiment_id,
                start_time=int(started * 1000),
                tags={**self._shared, **runs.trial_tags(candidate, parent, worker)},
                run_name=str(number),
            )
            self._runs[number] = run.info.run_id
        self._describe(candidate, setup)

    def _describe(self, candidate: Candidate, setup: Setup | None) -> None:
        run_id = self._runs[candidate.number]
        tags = {runs.NOTE: runs.trial_note(candidate, self._study, setup)} if self._study is not None else {}
        runs.log(self._client, run_id, params=runs.trial_params(candidate, setup), tags=tags)
        if self._dataset is not None:
            self._client.log_inputs(run_id, [self._dataset])

    def _end(self, result: TrialResult, metrics: Sequence[Any], *, ended: float) -> None:
        client, run_id = self._client, self._run_id(result.number)
        tags = {runs.STATE: result.state.value} | ({"hpo.reason": result.reason} if result.reason else {})
        tags |= {runs.FAILURE: result.failure.value} if result.failure else {}
        tags |= {runs.MEMBERS: runs.members_text(result.members)} if result.members else {}
        tags |= {f"{runs.MACHINE}{name}": value for name, value in result.settings.items()}
        tags |= {runs.NAME: runs.result_name(result)}
        runs.log(client, run_id, metrics=metrics, tags=tags)
        runs.log_files(client, run_id, runs.trial_files(result))
        client.set_terminated(run_id, runs.STATUS[result.state], end_time=int(ended * 1000))

    def _mend(self, trial: Trial, spec: StudySpec, run: Any | None) -> None:
        result = trial.result or TrialResult(trial.number, trial.state, reason="it ended without a result")
        started = trial.started or time.time()
        ended = result.ended or started + trial.run_seconds
        metrics = epoch_metrics(result.epochs, ended) + result_metrics(result, ended)
        if run is None:
            self._start(trial.candidate, _setup_of(trial, spec), worker=trial.worker, started=started)
        else:
            if not run.data.params or not run.inputs.dataset_inputs:  # killed between making it and describing it
                self._describe(trial.candidate, _setup_of(trial, spec))
            metrics = runs.unlogged(self._client, run, metrics)
        self._end(result, metrics, ended=ended)

    def _mend_paused(self, trial: Trial, spec: StudySpec, run: Any | None) -> None:
        if run is None:
            self._start(trial.candidate, _setup_of(trial, spec), worker=trial.worker, started=trial.started)
        if trial.result is not None and (run is None or run.status != runs.PAUSED):
            self.pause_trial(trial.result)


def _setup_of(trial: Trial, spec: StudySpec) -> Setup | None:
    try:
        return spec.with_values(trial.candidate.parameters)
    except SpecError:
        return None
