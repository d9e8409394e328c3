"""A study that machines share: one begins it, any number join, and a cluster's jobs are submitted and followed."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from hpo.cluster import Jobs, read_settings, submit, worker_command
from hpo.errors import HpoError, StoreError
from hpo.events import Notice, StudyEnded, StudyOpened
from hpo.execute.base_model import with_model
from hpo.execute.budget import as_fitted
from hpo.execute.finals import check_final
from hpo.execute.process import interruptible, process_context
from hpo.execute.run_study import await_job, refuse_new, run_study, with_options
from hpo.execute.subscribers import Events, Watch, Watcher
from hpo.execute.workers.job_process import JobProcess, Prepared, prepare
from hpo.home import Home
from hpo.jobs.stop import stop_study
from hpo.options import RunOptions
from hpo.records import EndReason, ModelVersion, StudyResult
from hpo.search.stages import budget_of
from hpo.spec.load import override_study
from hpo.spec.study import StudySpec
from hpo.storage.reader import StudyWatcher, find_study, list_trials
from hpo.tracking.registry import versions
from hpo.tracking.store import check_reachable
from hpo.tracking.tracker import Tracker


def shared_home(home: str | Path | None = None) -> Home:
    """The home, whose studies must be on a server. Raises StoreError where they are in a file of this machine."""
    found = Home.find(home)
    if not found.shared:
        raise StoreError(
            f"{found.root}: its studies are in a file, which workers on other machines cannot share.",
            "Name a PostgreSQL server, in the environment variable HPO_STORAGE or in hpo.toml.",
        )
    return found


def begin_study(spec: StudySpec, options: RunOptions, *, watch: Watch | None = None) -> StudyOpened:
    """Write the study into the shared storage, or find it there, so that `hpo worker` can join it; train nothing.

    The images are prepared and checked here, and their digest is written down. Of the options those apply that define
    the study: trials, keep_models, precision, fresh, extend, retry_failed and home. watch gets notices only. Returns
    the state of the study, with no workers. Raises HpoError.
    """
    home = shared_home(options.home).create()
    check_reachable(home)
    spec = with_model(with_options(spec, options), home)
    if not options.fresh and (known := find_study(home, spec.name)):
        spec = as_fitted(spec, known.fitted, trials=options.trials is None)
    emit = Events([Watcher(watch)] if watch else []).emit
    with contextlib.ExitStack() as cleanup:
        end = cleanup.enter_context(interruptible())
        jobs = JobProcess(process_context())
        cleanup.callback(jobs.close)
        job = jobs.submit(prepare, spec, "cpu")  # the machine that begins the study may have no GPU
        from hpo.search.lifecycle import open_study  # optuna is imported while data are prepared

        prepared: Prepared = await_job(job, jobs, emit, end)
        digest, budget = prepared.data.digest, budget_of(spec, options.trials)
        refuse_new(home, spec, prepared.data, fresh=options.fresh)
        check_final(spec, prepared.data)
        study = open_study(
            home,
            spec,
            data_digest=digest,
            class_names=prepared.data.class_names,
            budget=budget,
            fresh=options.fresh,
            extend=options.extend,
        )
        spec = study.spec
        cleanup.callback(study.close)
        for note in study.notes:
            emit(Notice(note))
        if options.retry_failed:
            study.retry_failed()
        before = study.result()
        # Workers that start at the same time find the run that each of them would otherwise make.
        Tracker(home).open_study(before, spec, prepared.data, prepared.split)
    finished = sum(trial.state.finished for trial in before.counted)
    return StudyOpened(before, prepared.data, prepared.split, budget, finished, workers=0, device="")


def join_study(study: str, options: RunOptions, *, watch: Watch | None = None) -> StudyResult:
    """Train trials of a study until its budget is spent; Ctrl-C, SIGTERM and kills lose nothing.

    study is its name, for its newest generation, or a title such as name~2. Its spec comes from the storage, and the
    data must be the same images. options.settings are for what differs from machine to machine, such as
    data.path=/scratch/images.npz; changes to the trials are refused. The other options that apply concern this machine:
    workers, stack, device, timeout and home. Raises HpoError.
    """
    home = Home.find(options.home)
    known = list_trials(home, study)
    spec = override_study(known.spec, options.settings, trust=options.trust)
    if home.shared and home.embedded and watch is not None:
        watch(
            Notice("MLflow is not shared: runs and models of this worker stay in this folder. Set MLFLOW_TRACKING_URI.")
        )
    return run_study(spec, replace(options, settings=()), join=known.title, watch=watch)


_TICK = 1.0  # seconds between readings of the study
_SUM_UP = 300.0  # seconds in which the workers of a finished study must end


@dataclass(frozen=True)
class Submitted:
    """An array of workers that continues by itself. jobs are the scheduler's names; folder holds their logs."""

    study: str
    jobs: tuple[str, ...]
    folder: Path


def run_array(
    spec: StudySpec,
    options: RunOptions,
    *,
    worker: RunOptions | None = None,
    cluster: str = "slurm",
    watch: Watch | None = None,
) -> StudyResult | Submitted:
    """Run or resume a study on an array of options.workers jobs, each an `hpo worker`.

    options.slurm are texts for submitit (see read_settings). worker holds the options of each `hpo worker`, by default
    those of the run that apply to it. This process only watches: the workers register the best model. Ctrl-C ends the
    study and the jobs cleanly; killing this process ends neither. With options.detach it returns once the jobs are
    submitted. cluster is slurm, or local for processes of this machine. Raises HpoError, also where all jobs have ended
    before the study.
    """
    if not options.workers:
        raise HpoError("--engine slurm: the number of jobs is missing.", "Give it: --workers 8")
    settings = read_settings(options.slurm)
    home = shared_home(options.home)
    emit: Watch = watch or (lambda _: None)
    if cluster == "slurm" and shutil.which("sbatch") is None:  # before anything is written
        raise HpoError(
            "--engine slurm: there is no sbatch here.", "Submit on a login node, or print the script: --print"
        )
    opened = begin_study(spec, options, watch=watch)
    study = opened.study
    if opened.finished >= opened.budget and spec.final is None:
        emit(opened)
        emit(StudyEnded(study, EndReason.BUDGET, _model(home, study)))
        return study
    follower = StudyWatcher(home, study)
    follower.new_events()  # the state before the first job
    folder = home.root / "jobs" / study.title
    flags = (worker or options.of_worker()).flags()
    command = worker_command(study.exact, flags, home=home.root.parent)
    jobs = submit(command, name=study.name, workers=options.workers, folder=folder, settings=settings, cluster=cluster)
    emit(replace(opened, workers=len(jobs), device=cluster))
    emit(Notice(f"submitted {jobs}; logs in {folder}"))
    if options.detach:
        return Submitted(study.title, jobs.names, folder)
    return _ArrayRun(home, opened, follower, jobs, emit).run()


class _ArrayRun:
    def __init__(self, home: Home, opened: StudyOpened, follower: StudyWatcher, jobs: Jobs, emit: Watch) -> None:
        self._home, self._opened, self._follower, self._jobs, self._emit = home, opened, follower, jobs, emit
        self._unreadable = False

    def run(self) -> StudyResult:
        with interruptible() as end:
            reason = self._watch(end.interrupted)
        study = list_trials(self._home, self._opened.study.exact)
        self._emit(StudyEnded(study, reason, _model(self._home, study)))
        return study

    def _watch(self, interrupted: threading.Event) -> EndReason:
        """Follow the study until it or all jobs have ended; returns the reason of StudyEnded."""
        follower, deadline = self._follower, float("inf")
        while True:
            ended = not self._jobs.left()  # asked first, so that the end of the last job is read below
            self._read()
            if interrupted.is_set():
                self._stop()
                return EndReason.INTERRUPTED
            done = follower.over and (follower.renewed or follower.finished >= self._opened.budget)
            if ended:
                if done or follower.stopped:
                    return self._reason() if done else EndReason.STOPPED
                raise self._unfinished()
            if done and follower.renewed and deadline == float("inf"):
                deadline = time.monotonic() + _SUM_UP
                self._jobs.cancel(waiting=True)  # they would have nothing to do
            if time.monotonic() > deadline:
                return self._reason()
            interrupted.wait(_TICK)

    def _reason(self) -> EndReason:
        if list_trials(self._home, self._opened.study.exact).enough:
            return EndReason.ENOUGH
        spent = self._follower.finished >= self._opened.budget
        return EndReason.BUDGET if spent else EndReason.EXHAUSTED

    def _read(self) -> None:
        try:
            events = self._follower.new_events()
        except StoreError as error:  # the jobs wait for the storage too
            if not self._unreadable:
                self._emit(Notice(f"the study cannot be read: {error} The jobs continue."))
            self._unreadable = True
            return
        if self._unreadable:
            self._emit(Notice("the study can be read again."))
        self._unreadable = False
        for event in events:
            self._emit(event)

    def _stop(self) -> None:
        self._emit(Notice("stopping the study and its jobs ..."))
        self._jobs.cancel(waiting=True)
        try:
            stop_study(self._opened.study.exact, home=self._home.root.parent)
        except StoreError as error:
            self._emit(Notice(str(error)))
        self._jobs.cancel()
        self._read()

    def _unfinished(self) -> HpoError:
        study, done = self._opened.study, f"{self._follower.finished} of {self._opened.budget} trials done"
        message = f"{study.title}: all jobs have ended, with {done}."
        words = self._jobs.end_of_log()
        if not words:
            return HpoError(message, f"They left no log in {self._jobs.folder}: ask SLURM about {self._jobs}.")
        return HpoError(
            f"{message} The end of {words}",
            f"Fix what it says, or give the jobs more time, and run this again to resume. Logs: {self._jobs.folder}",
        )


def _model(home: Home, study: StudyResult) -> ModelVersion | None:
    """The newest version that the study has registered; None where there is none, or the registry cannot be read."""
    try:
        known = versions(home, study.name)
    except StoreError:
        return None
    return next((version for version in known if version.study == study.title), None)
