"""Run a study: open it, prepare its data, choose workers, supervise the trials, and register the winner."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from hpo.data.duplicates import refuse_shared
from hpo.errors import SpecError
from hpo.events import Notice, SearchEnded, StudyEnded, StudyOpened, WinnerChosen
from hpo.execute.base_model import with_model
from hpo.execute.engines import engine_factory
from hpo.execute.engines.base import EngineFactory, StudyWork, WorkerPlan
from hpo.execute.finals import check_final, finalists, race
from hpo.execute.process import process_context
from hpo.execute.stack_size import StackSize, largest_stack
from hpo.execute.subscribers import Emit, Events, Subscriber, Watch, Watcher
from hpo.execute.subscribers.model_retention import ModelRetention
from hpo.execute.subscribers.profile import Profiling
from hpo.execute.subscribers.tracking import QUICK_TIMEOUT, Tracking
from hpo.execute.supervisor import Supervisor
from hpo.execute.tracking_queue import TrackingQueue
from hpo.execute.workdir import WorkdirCleanup, pictures_folder, sweep
from hpo.execute.workers.job_process import Job, JobProcess, Prepared, measure_stack, prepare
from hpo.home import Home
from hpo.options import RunOptions
from hpo.records import DataCard, EndReason, StudyResult
from hpo.relocation import relocate
from hpo.search.stages import budget_of, stage_warnings
from hpo.spec.study import KeepSpec, StudySpec
from hpo.spec.training import TrainingSpec
from hpo.storage.reader import read_snapshots
from hpo.tracking.store import check_reachable, load_mlflow
from hpo.tracking.tracker import Tracker


@dataclass(frozen=True)
class _Run:
    """The parts of a run that exist before its study is open. join is the title of a study to take part in, or ""."""

    spec: StudySpec
    options: RunOptions
    home: Home
    join: str
    deadline: float
    interrupted: threading.Event
    events: Events
    factory: EngineFactory
    jobs: JobProcess
    queue: TrackingQueue
    tracker: Tracker

    def notify(self, text: str) -> None:
        """Emit a line for the user."""
        self.events.emit(Notice(text))


@dataclass(frozen=True)
class _OpenStudy:
    """The study (hpo.search.study.Study), its state at the start of the run, and its folder of work in progress."""

    spec: StudySpec
    study: Any
    before: StudyResult
    trials_of_others: frozenset[int]
    prepared: Prepared
    work: Path

    @property
    def finished(self) -> int:
        """The number of trials of the budget that earlier runs have finished."""
        return sum(trial.state.finished for trial in self.before.counted)


def run_study(
    spec: StudySpec,
    options: RunOptions | None = None,
    *,
    join: str = "",
    watch: Watch | None = None,
    **named: Any,
) -> StudyResult:
    """Run or resume a study until it has `trials` trials in all, and register its best model as challenger.

    named are fields of RunOptions, such as trials=20 and workers=2; they may be given instead of options, or replace
    some of them. watch is called with every event. With join the run takes part in a study that exists already, up to
    the budget of its record, which stays as it is; of all runs that take part, one writes the summary. Ctrl-C ends the
    run cleanly: running trials are recorded as stopped, and the next run tries them again. Raises HpoError for whatever
    the user can fix.
    """
    options = replace(options or RunOptions(), **named)
    with contextlib.ExitStack() as cleanup:
        run = _start(spec, options, join=join, watch=watch, cleanup=cleanup)
        opened = _open_study(run, cleanup)
        plan, stack = _choose_workers(run, opened)
        tracking = _subscribe(run, opened, cleanup)
        _emit_opening(run, opened, plan, stack)
        reason = _supervise(run, opened, plan, stack, cleanup)
        return _finish(run, opened, reason, tracking)


def _start(
    spec: StudySpec, options: RunOptions, *, join: str, watch: Watch | None, cleanup: contextlib.ExitStack
) -> _Run:
    """Check the options and the tracking store, and start the processes and threads that every step needs."""
    factory = engine_factory(options)
    home = Home.find(options.home).create()
    moved = relocate(home)
    check_reachable(home)  # an outage later on is waited for; at the start it is more likely a wrong address
    spec = with_model(with_options(spec, options), home)
    deadline = time.monotonic() + options.timeout if options.timeout is not None else float("inf")
    interrupted = cleanup.enter_context(interruptible())
    tracker, queue = Tracker(home), TrackingQueue()
    cleanup.callback(queue.close, timeout=QUICK_TIMEOUT)
    jobs = JobProcess(process_context())
    cleanup.callback(jobs.close)
    events = Events([Watcher(watch)] if watch else [])
    if moved:
        events.emit(Notice(moved))
    return _Run(spec, options, home, join, deadline, interrupted, events, factory, jobs, queue, tracker)


def _open_study(run: _Run, cleanup: contextlib.ExitStack) -> _OpenStudy:
    """Prepare the data, open the study, finish what dead runs have left, and clean the folder of work."""
    spec, options = run.spec, run.options
    job = run.jobs.submit(prepare, spec, run.factory.device)
    run.queue.submit(load_mlflow)  # its import takes seconds, and happens while data are prepared
    from hpo.search.lifecycle import open_study  # and so does optuna's

    cleanup.callback(run.factory.close)
    run.factory.connect()
    prepared: Prepared = await_job(job, run.jobs, run.events.emit, run.interrupted)
    refuse_new(run.home, spec, prepared.data, fresh=options.fresh)
    check_final(spec, prepared.data)
    study = open_study(
        run.home,
        spec,
        data_digest=prepared.data.digest,
        class_names=prepared.data.class_names,
        budget=budget_of(spec, options.trials),
        fresh=options.fresh,
        join=run.join,
    )
    cleanup.callback(study.close)
    study.reap()
    if options.retry_failed:
        study.retry_failed()
    trials_of_others, before = frozenset(study.trials_of_others()), study.result()
    work = run.home.work / before.title
    sweep(work, study)
    return _OpenStudy(study.spec, study, before, trials_of_others, prepared, work)


def _choose_workers(run: _Run, opened: _OpenStudy) -> tuple[WorkerPlan, StackSize]:
    """The workers, and the number of trainings that each does at once."""
    spec, options, prepared = opened.spec, run.options, opened.prepared
    left = max(1, opened.study.budget - opened.finished, len(finalists(spec, opened.before)))
    plan = run.factory.plan(prepared.devices, most=left)
    # A profile could not divide the time of a shared computation among its trainings.
    if not run.factory.stacks or options.profile or options.stack is not None:
        return plan, StackSize((options.stack or 1) if run.factory.stacks and not options.profile else 1)
    most = largest_stack(spec, left=left, workers=len(plan.devices), by_default=options.workers is None)
    job = run.jobs.submit(measure_stack, spec, prepared.data, plan.devices[0], plan.threads, most)
    return plan, await_job(job, run.jobs, run.events.emit, run.interrupted)


def _subscribe(run: _Run, opened: _OpenStudy, cleanup: contextlib.ExitStack) -> Tracking:
    """Subscribe all that follows the events of this run; callers' watch functions come last."""
    emit, data = run.events.emit, opened.prepared.data
    retention = ModelRetention(run.tracker, run.queue, run.jobs, opened.spec, work=opened.work, data=data, emit=emit)
    tracking = Tracking(
        run.tracker,
        run.queue,
        opened.spec,
        emit=emit,
        jobs=run.jobs,
        figures=pictures_folder(opened.work, opened.study),
        joined=bool(run.join),
        keeps=retention.keeps,
    )
    profile: list[Subscriber] = (
        [Profiling(run.jobs, emit=emit, in_process=run.options.workers == 0)] if run.options.profile else []
    )
    run.events.subscribe_first(*profile, tracking, retention, WorkdirCleanup(opened.work, opened.study))
    # Before the study gives up its lease: until then others leave this run's trials alone.
    cleanup.callback(run.events.close)
    return tracking


def _emit_opening(run: _Run, opened: _OpenStudy, plan: WorkerPlan, stack: StackSize) -> None:
    event = StudyOpened(
        study=opened.before,
        data=opened.prepared.data,
        split=opened.prepared.split,
        budget=opened.study.budget,
        finished=opened.finished,
        workers=len(plan.devices),
        device=plan.description,
        stack=stack.count,
        alone=stack.reason,
        trials_of_others=opened.trials_of_others,
    )
    run.events.emit(event)
    for note in opened.study.notes:
        run.notify(note)


def _supervise(
    run: _Run, opened: _OpenStudy, plan: WorkerPlan, stack: StackSize, cleanup: contextlib.ExitStack
) -> EndReason:
    """Start the workers and run the trials."""
    work = StudyWork(opened.spec, opened.prepared.data, run.notify)
    engine = run.factory.start(plan, work, stack=stack.count)
    cleanup.callback(engine.close)
    return Supervisor(
        opened.spec,
        opened.study,
        engine,
        data=opened.prepared.data,
        work=opened.work,
        events=run.events,
        budget=opened.study.budget,
        deadline=run.deadline,
        interrupted=run.interrupted,
        profile=run.options.profile,
    ).run()


def _finish(run: _Run, opened: _OpenStudy, reason: EndReason, tracking: Tracking) -> StudyResult:
    """Choose the winner, wait for the tracking store, and end the study."""
    spec, emit = opened.spec, run.events.emit
    summarize = not run.join or (reason.orderly and opened.study.claim_end())
    trials_of_others = frozenset(opened.study.trials_of_others())
    study: StudyResult = opened.study.result()
    emit(SearchEnded(study, reason, trials_of_others, summarize))
    outcome = race(spec, study, data=opened.prepared.data)
    remarks = [str(outcome)] * bool(outcome) + stage_warnings(study)
    for text in remarks:
        run.notify(text)
    winner = outcome.winner if outcome else None if spec.final else study.best
    # A worker whose time is up leaves a study that others continue: its best is not known yet.
    register = reason.orderly and not (run.join and reason is EndReason.TIMEOUT)
    emit(WinnerChosen(study, reason, winner, tuple(remarks), register=register, summarize=summarize))
    for notice in run.jobs.notices():
        emit(notice)
    model = tracking.finish(reason)
    emit(StudyEnded(study, reason, model))
    return study


def refuse_new(home: Home, spec: StudySpec, data: DataCard, *, fresh: bool) -> None:
    """Refuse to begin a study on parts that share images; one that has begun goes on. Raises DataError."""
    if data.shared and (fresh or spec.name not in {each.study.name for each in read_snapshots(home, results=False)}):
        refuse_shared(data)


def with_options(spec: StudySpec, options: RunOptions) -> StudySpec:
    """The spec, changed where the options say otherwise. Raises SpecError."""
    trials, keep_models, precision = options.trials, options.keep_models, options.precision
    if trials is not None:
        spec = spec.model_copy(update={"search": spec.search.model_copy(update={"trials": trials})})
    if keep_models is not None:
        try:
            spec = spec.model_copy(update={"keep": KeepSpec(models=keep_models, figures=spec.keep.figures)})
        except ValidationError:
            raise SpecError(f"--keep-models {keep_models}: unknown policy.", "Give all, none or best:K.") from None
    if precision is not None:
        known = get_args(TrainingSpec.model_fields["precision"].annotation)
        if precision not in known:
            raise SpecError(f"--precision {precision}: is unknown.", f"Choose one of: {', '.join(known)}.")
        spec = spec.model_copy(update={"training": spec.training.model_copy(update={"precision": precision})})
    return spec


def await_job(job: Job, jobs: JobProcess, emit: Emit, interrupted: threading.Event) -> Any:
    """The result of a job; the notices of its process are emitted meanwhile."""
    while True:
        for notice in jobs.notices():
            emit(notice)
        if interrupted.is_set():
            raise KeyboardInterrupt
        with contextlib.suppress(TimeoutError):
            result = job.result(timeout=0.1)
            for notice in jobs.notices():
                emit(notice)
            return result


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event; a second Ctrl-C ends the process the usual way."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # signals belong to the main thread
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:  # noqa: ARG001 - the signature that signal wants
        # Schedulers send SIGTERM more than once; to end a process at once they have SIGKILL.
        if interrupted.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        interrupted.set()

    for number in before:
        signal.signal(number, note)
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
