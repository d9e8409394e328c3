"""Run a study: open it, prepare its data, choose workers, supervise the trials, and register the winner."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from hpo.data.duplicates import refuse_shared
from hpo.errors import HpoError, SpecError, StoreError
from hpo.events import Notice, SearchEnded, StudyEnded, StudyOpened, WinnerChosen
from hpo.execute.base_model import with_model
from hpo.execute.budget import Fitted, as_fitted, as_written, end_of_search, fit, measure_pace
from hpo.execute.closing_ensemble import EnsembleOfRun, close_with_ensemble, context_of_run
from hpo.execute.engines import engine_factory
from hpo.execute.engines.base import EngineFactory, StudyWork, WorkerPlan
from hpo.execute.finals import check_final, race
from hpo.execute.process import RunEnd, interruptible, process_context, start_fork_server
from hpo.execute.stack_size import StackSize, largest_stack
from hpo.execute.subscribers import Emit, Events, Subscriber, Watch, Watcher
from hpo.execute.subscribers.model_retention import ModelRetention
from hpo.execute.subscribers.profile import Profiling
from hpo.execute.subscribers.tracking import QUICK_TIMEOUT, Tracking
from hpo.execute.supervisor import Supervisor
from hpo.execute.tracking_queue import TrackingQueue, tracker_of
from hpo.execute.workdir import WorkdirCleanup, pictures_folder, sweep
from hpo.execute.workers.job_process import Job, JobProcess, Prepared, measure_stack, prepare
from hpo.home import Home
from hpo.options import RunOptions
from hpo.records import DataCard, EndReason, StudyResult
from hpo.relocation import relocate
from hpo.search.stages import budget_of, stage_warnings
from hpo.spec.outcome import KeepSpec
from hpo.spec.study import StudySpec
from hpo.spec.training import TrainingSpec
from hpo.storage.reader import find_study, list_trials, read_snapshots
from hpo.tracking.ledger import openings_of_lost
from hpo.tracking.store import check_reachable
from hpo.tracking.tracker import Tracker

_STOP, _SHARED_STOP = 2.0, 10.0  # seconds between checks for hpo stop


@dataclass(frozen=True)
class _Run:
    """The parts of a run that exist before its study is open.

    join is the title of a study to take part in, or "". written is the file's number of trials.
    """

    spec: StudySpec
    written: int
    options: RunOptions
    home: Home
    join: str
    deadline: float  # a time.monotonic() value or inf
    end: RunEnd
    events: Events
    factory: EngineFactory
    jobs: JobProcess
    drawing: JobProcess
    queue: TrackingQueue
    tracker: Tracker

    def notify(self, text: str) -> None:
        """Emit a line for the user."""
        self.events.emit(Notice(text))


@dataclass(frozen=True)
class _OpenStudy:
    """The study (hpo.search.study.Study), its state at the start of the run, and its folder of work in progress.

    search_until is when the search hands out its last candidate, a time.monotonic() value or inf.
    """

    spec: StudySpec
    study: Any
    before: StudyResult
    trials_of_others: frozenset[int]
    prepared: Prepared
    work: Path
    search_until: float = math.inf
    retried: bool = False  # failed candidates wait to be tried again

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
    closing: float = 0.0,
    **named: Any,
) -> StudyResult:
    """Run or resume a study until it has `trials` trials in all, and register its best model as challenger.

    named are fields of RunOptions, such as trials=20, in place of options or of some of them. watch is called with
    every event. With join the run takes part in a study that exists already, up to the budget of its record; of all
    runs that take part, one writes the summary. closing: the seconds of options.timeout that final trainings have.
    Ctrl-C ends the run cleanly: the next run tries running trials again. Raises HpoError for what the user can fix.
    """
    options = replace(options or RunOptions(), **named)
    with contextlib.ExitStack() as cleanup:
        run = _start(spec, options, join=join, watch=watch, cleanup=cleanup)
        opened = _open_study(run, closing, cleanup)
        plan, stack = _choose_workers(run, opened)
        tracking = _subscribe(run, opened, cleanup)
        _emit_opening(run, opened, plan, stack)
        reason = _supervise(run, opened, plan, stack, cleanup)
        return _finish(run, opened, reason, tracking)


def _start(
    spec: StudySpec, options: RunOptions, *, join: str, watch: Watch | None, cleanup: contextlib.ExitStack
) -> _Run:
    """Check the options and the tracking store, and start the processes and threads that every step needs."""
    if options.minutes is not None and options.engine != "processes":
        raise HpoError("--minutes: the speed is measured on this machine.", "Limit the time instead: --timeout 20m")
    limits = [options.timeout, None if options.minutes is None else 60 * options.minutes]
    deadline = time.monotonic() + min((limit for limit in limits if limit is not None), default=math.inf)
    factory = engine_factory(options)
    start_fork_server()
    home = Home.find(options.home).create()
    moved = relocate(home)
    check_reachable(home)  # an outage later on is waited for; at the start it is more likely a wrong address
    written, spec = spec.search.trials, with_model(with_options(spec, options), home)
    end = cleanup.enter_context(interruptible(deadline))
    tracker, queue = tracker_of(home, cleanup.callback), TrackingQueue(end=end)
    cleanup.callback(queue.close, timeout=QUICK_TIMEOUT)
    jobs, drawing = JobProcess(process_context()), JobProcess(process_context())
    cleanup.callback(jobs.close)
    cleanup.callback(drawing.close)
    events = Events([Watcher(watch)] if watch else [])
    if moved:
        events.emit(Notice(moved))
    return _Run(spec, written, options, home, join, deadline, end, events, factory, jobs, drawing, queue, tracker)


def _open_study(run: _Run, closing: float, cleanup: contextlib.ExitStack) -> _OpenStudy:
    """Prepare the data, open the study, finish what dead runs have left, and clean the folder of work."""
    spec, options = run.spec, run.options
    from hpo.search.lifecycle import open_study
    from hpo.storage.optuna_storage import open_storage

    open_storage(run.home).close()  # a new one is made while the fork server, which the next line waits for, starts
    job = run.jobs.submit(prepare, spec, run.factory.device)
    cleanup.callback(run.factory.close)
    run.factory.connect()
    prepared: Prepared = await_job(job, run.jobs, run.events.emit, run.end)
    refuse_new(run.home, spec, prepared.data, fresh=options.fresh)
    check_final(spec, prepared.data)
    run.factory.plan(prepared.devices, most=1)  # what it refuses begins no study
    spec, fitted = _fit(run, prepared)
    study = open_study(
        run.home,
        spec,
        data_digest=prepared.data.digest,
        class_names=prepared.data.class_names,
        budget=budget_of(spec, None if fitted else options.trials),
        fitted=fitted.to_json() if fitted else None,
        fresh=options.fresh,
        extend=options.extend,
        join=run.join,
    )
    cleanup.callback(study.close)
    run.end.watch_stop(partial(_stop_asked, study), every=_SHARED_STOP if study.shared else _STOP)
    study.reap()
    retried = options.retry_failed and study.retry_failed() > 0
    trials_of_others, before = frozenset(study.trials_of_others()), study.result()
    work = run.home.work / before.title
    sweep(work, study)
    # The last trials and the final trainings must fit in; without those, what runs at the deadline is taken up again.
    search_until = end_of_search(run.deadline, fitted.closing if fitted else closing) if spec.final else math.inf
    return _OpenStudy(study.spec, study, before, trials_of_others, prepared, work, search_until, retried)


def _fit(run: _Run, prepared: Prepared) -> tuple[StudySpec, Fitted | None]:
    """The spec as it was or is fitted to minutes, and what is fitted now; None without --minutes."""
    spec, options = run.spec, run.options
    known = None if options.fresh or run.join else find_study(run.home, spec.name)
    record = known.fitted if known else {}
    if options.minutes is None:
        return as_fitted(spec, record, trials=options.trials is None), None
    spec = as_written(spec, run.written)
    begun = as_fitted(spec, record, trials=False)
    plan = run.factory.plan(prepared.devices, most=sys.maxsize)
    job = run.jobs.submit(measure_pace, begun, prepared.data, plan.devices[0], plan.threads, 60 * options.minutes)
    pace = await_job(job, run.jobs, run.events.emit, run.end)
    fitted = fit(
        begun,
        pace,
        seconds=run.deadline - time.monotonic(),
        workers=len(plan.devices),
        most=options.trials,
        done=len(list_trials(run.home, known.exact).counted) if known else 0,
        begun=known is not None,
    )
    if known:  # the epochs of then stay those that a later resume finds
        fitted = replace(fitted, settings={**record.get("settings", {}), **fitted.settings})
    run.notify(f"{options.minutes:g} min: {fitted.text}")
    return as_fitted(spec, fitted.to_json(), trials=True), fitted


def _choose_workers(run: _Run, opened: _OpenStudy) -> tuple[WorkerPlan, StackSize]:
    """The workers, and the number of trainings that each does at once."""
    spec, options, prepared = opened.spec, run.options, opened.prepared
    left = max(1, opened.study.budget - opened.finished, spec.final.trainings if spec.final else 0)
    plan = run.factory.plan(prepared.devices, most=left)
    # A profile could not divide the time of a shared computation among its trainings.
    if plan.ranks > 1:
        return plan, StackSize(1, "each trial trains in several processes")
    if not run.factory.stacks or options.profile or options.stack is not None:
        return plan, StackSize((options.stack or 1) if run.factory.stacks and not options.profile else 1)
    most = largest_stack(spec, left=left, workers=len(plan.devices), by_default=options.workers is None)
    job = run.jobs.submit(measure_stack, spec, prepared.data, plan.devices[0], plan.threads, most)
    if run.end.await_done(job, reserve=math.inf):
        return plan, await_job(job, run.jobs, run.events.emit, run.end)
    run.jobs.restart()
    return plan, StackSize(1, "the run was to end before that was measured")


def _subscribe(run: _Run, opened: _OpenStudy, cleanup: contextlib.ExitStack) -> Tracking:
    """Subscribe all that follows the events of this run; callers' watch functions come last."""
    emit, data = run.events.emit, opened.prepared.data
    retention = ModelRetention(
        run.tracker, run.queue, run.jobs, opened.spec, work=opened.work, data=data, emit=emit, end=run.end
    )
    tracking = Tracking(
        run.tracker,
        run.queue,
        opened.spec,
        emit=emit,
        end=run.end,
        drawing=run.drawing,
        figures=pictures_folder(opened.work, opened.study) / "figures",
        joined=bool(run.join),
        keeps=retention.keeps,
    )
    profile: list[Subscriber] = (
        [Profiling(run.jobs, run.end, emit=emit, in_process=run.options.workers == 0)] if run.options.profile else []
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
    if note := lost_note(run.home, opened.before):
        run.notify(note)


def lost_note(home: Home, study: StudyResult) -> str:
    """A line for the user where the ledger knows an earlier study of this title, which the storage has lost; or ""."""
    if not any(opening.study == study.title for opening in openings_of_lost(home, [study])):
        return ""
    return (
        f"an earlier study {study.title} has opened its test part, and the study storage does not have it any more: "
        "was the database emptied? Its openings still count. See hpo doctor"
    )


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
        end=run.end,
        profile=run.options.profile,
        ranks=plan.ranks,
        search_until=opened.search_until,
        retried=opened.retried,
    ).run()


def _finish(run: _Run, opened: _OpenStudy, reason: EndReason, tracking: Tracking) -> StudyResult:
    """Choose the winner, wait for the tracking store, and end the study."""
    spec, emit = opened.spec, run.events.emit
    summarize = not run.join or (reason.orderly and opened.study.claim_end(early=reason.early))
    trials_of_others = frozenset(opened.study.trials_of_others())
    study: StudyResult = opened.study.result()
    emit(SearchEnded(study, reason, trials_of_others, summarize))
    outcome = race(spec, study, data=opened.prepared.data)
    remarks = [str(outcome)] * bool(outcome) + stage_warnings(study)
    for text in remarks:
        run.notify(text)
    remarks += [study.enough] * bool(study.enough)
    winner = outcome.winner if outcome else None if spec.final else study.best
    # A worker whose time is up leaves a study that others continue: its best is not known yet.
    register = reason.orderly and not (run.join and reason is EndReason.TIMEOUT)
    emit(WinnerChosen(study, reason, winner, tuple(remarks), register=register, summarize=summarize))
    for notice in (*run.jobs.notices(), *run.drawing.notices()):
        emit(notice)
    ensemble = _ensemble(run, opened) if register and summarize else EnsembleOfRun()
    model = tracking.finish(reason)
    emit(StudyEnded(study, reason, ensemble.version or model, ensemble.line))
    return study


def _ensemble(run: _Run, opened: _OpenStudy) -> EnsembleOfRun:
    """What an ensemble of the study gains; made, where the study asks for one. An error is a notice then."""
    try:
        data, trust = opened.prepared.data, run.options.trust
        context = context_of_run(opened.study, data, run.tracker, run.queue, run.jobs, run.end, trust=trust)
        return close_with_ensemble(opened.study, context)
    except (HpoError, OSError, TimeoutError) as error:
        if opened.spec.ensemble is not None:
            why = getattr(error, "message", "") or str(error) or "the run had to end."
            run.notify(f"no ensemble was made: {why} Later: hpo ensemble {opened.before.name}")
        return EnsembleOfRun()


def refuse_new(home: Home, spec: StudySpec, data: DataCard, *, fresh: bool) -> None:
    """Refuse to start a study on parts that share images; one that has started may resume. Raises DataError."""
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


def await_job(job: Job, jobs: JobProcess, emit: Emit, end: RunEnd) -> Any:
    """The result of a job that the run needs; the notices of its process are emitted meanwhile.

    Raises KeyboardInterrupt after Ctrl-C, and HpoError when the deadline has passed.
    """
    while True:
        for notice in jobs.notices():
            emit(notice)
        with contextlib.suppress(TimeoutError):
            result = job.result(timeout=0.1)
            for notice in jobs.notices():
                emit(notice)
            return result
        if end.interrupted.is_set():
            raise KeyboardInterrupt
        if end.reason():
            raise HpoError(
                "--timeout: its time was over before the images were prepared, so nothing was trained.",
                "Give more time, or see what takes so long: hpo check STUDY",
            )


def _stop_asked(study: Any) -> bool:
    with contextlib.suppress(StoreError):  # the next ask reports what refuses now
        return bool(study.stop_asked())
    return False
