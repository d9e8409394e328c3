"""A study on a storage that machines share: one of them begins it, and any number of them join."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from hpo.errors import StoreError
from hpo.events import Notice, StudyOpened
from hpo.execute.base_model import with_model
from hpo.execute.finals import check_final
from hpo.execute.process import interruptible, process_context
from hpo.execute.run_study import await_job, refuse_new, run_study, with_options
from hpo.execute.subscribers import Events, Watch, Watcher
from hpo.execute.workers.job_process import JobProcess, Prepared, prepare
from hpo.home import Home
from hpo.options import RunOptions
from hpo.records import StudyResult
from hpo.search.stages import budget_of
from hpo.spec.load import override_study
from hpo.spec.study import StudySpec
from hpo.storage.reader import list_trials
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
    the study: trials, keep_models, precision, fresh, retry_failed and home. watch gets notices only. Returns the state
    of the study, with no workers. Raises HpoError.
    """
    home = shared_home(options.home).create()
    check_reachable(home)
    spec = with_model(with_options(spec, options), home)
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
