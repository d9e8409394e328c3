"""Run a study: prepare its data, start its workers, supervise, register the winner."""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from hpo.data.duplicates import refuse_shared
from hpo.errors import HpoError, SpecError
from hpo.execute.base_model import with_model
from hpo.execute.engines.local import Engine, InProcess, LocalProcesses
from hpo.execute.engines.ray_cluster import Cluster, RayOptions
from hpo.execute.finals import check_final, finalists, race
from hpo.execute.process import cores, process_context
from hpo.execute.stack_size import Places, most_places
from hpo.execute.subscribers import profile as profiling
from hpo.execute.subscribers.model_retention import Keeper
from hpo.execute.supervisor import Supervisor, Watch
from hpo.execute.tracking_queue import PATIENCE, Background
from hpo.execute.workdir import pictures_folder, sweep
from hpo.execute.workers.job_process import Helper, Job, Prepared, draw_study, measure_stack, prepare, spent
from hpo.home import Home
from hpo.profile import NO_CLOCK, Clock, timed
from hpo.records import DataCard, Event, Notice, StudyEnded, StudyOpened, StudyResult
from hpo.report.summary import study_summary
from hpo.search.stages import budget_of, stage_warnings
from hpo.spec.study import KeepSpec, StudySpec
from hpo.spec.training import TrainingSpec
from hpo.storage.reader import look
from hpo.tracking.store import knock, load_mlflow
from hpo.tracking.tracker import Tracker


def run_study(
    spec: StudySpec,
    *,
    trials: int | None = None,
    workers: int | None = None,
    stack: int | None = None,
    device: str = "auto",
    home: str | Path | None = None,
    fresh: bool = False,
    retry_failed: bool = False,
    timeout: float | None = None,
    keep_models: str | None = None,
    precision: str | None = None,
    profile: bool = False,
    join: str = "",
    ray: RayOptions | None = None,
    watch: Watch | None = None,
) -> StudyResult:
    """Run or continue a study until it has `trials` trials in all, and register its best model as challenger.

    workers is the number of processes that train (default: one for each core, or for each GPU); 0 trains in this
    process. stack is the number of trainings that share a worker and its computation; None: by a short measurement, 1
    where it does not pay, or where workers=1, so that nothing depends on a clock.
    device is auto, cpu, cuda, cuda:N or mps. home is the folder that holds `mlruns`. fresh starts the study
    anew beside what there is; retry_failed tries failed trials again. timeout is in seconds. keep_models is all, none
    or best:K; precision auto, float32 or bfloat16. With profile trainings share nothing, and the last event but one is
    a StudyProfiled, which says where the time went. With join it takes part in a study that is there already, to the
    budget of its record, which stays as it is; of all that take part one sums the study up. With ray the workers are
    actors of that Ray, by default as many as there is room for. watch is called with every event. Ctrl-C ends the run
    cleanly: what was running is recorded as stopped and tried again by the next run. Raises HpoError for whatever the
    user can mend.
    """
    if ray is not None:
        ray.knock()
    place = Home.find(home).create()
    knock(place)  # an outage later on is waited for; at the start it is more likely a wrong address
    spec = with_model(with_options(spec, trials=trials, keep_models=keep_models, precision=precision), place)
    if workers is not None and workers < 0:
        raise HpoError(f"--workers {workers}: is negative.", "Give 1 or more, or 0 to train in this process.")
    if stack is not None and stack < 1:
        raise HpoError(f"--stack {stack}: is not positive.", "Give 1 or more, or auto.")
    if ray is not None and (workers == 0 or (stack or 1) > 1):
        option = "--workers 0" if workers == 0 else f"--stack {stack}"
        raise HpoError(f"{option}: is not for Ray, whose workers train one candidate each.", "Leave it out.")
    deadline = time.monotonic() + timeout if timeout is not None else float("inf")
    say: Watch = watch or _ignore
    context = process_context()
    clock = Clock() if profile else NO_CLOCK

    def tell(text: str) -> None:
        say(Notice(text))

    with contextlib.ExitStack() as cleanup:
        interrupted = cleanup.enter_context(interruptible())
        tracker, background = timed(Tracker(place), clock, **profiling.TRACKER), Background()
        cleanup.callback(background.join, patience=5.0)
        helper = Helper(context)
        cleanup.callback(helper.close)
        job = helper.submit(prepare, spec.data, spec.split, "cpu" if ray else device)
        background.submit(load_mlflow)  # mlflow's import takes seconds: it goes on beside the preparation
        from hpo.search.open import open_study  # and so does optuna's

        cluster = Cluster(ray, device=device) if ray else None
        if cluster is not None:
            cleanup.callback(cluster.close)
        prepared: Prepared = await_job(job, helper, say, interrupted)
        refuse_new(place, spec, prepared.data, fresh=fresh)
        check_final(spec, prepared.data)
        budget = budget_of(spec, trials)
        study = open_study(
            place,
            spec,
            data_digest=prepared.data.digest,
            class_names=prepared.data.class_names,
            budget=budget,
            fresh=fresh,
            join=join,
        )
        budget, spec = study.budget, study.spec
        study = timed(study, clock, **profiling.STUDY)
        cleanup.callback(study.close)
        # Before the lease is given up: others leave our runs alone until then.
        cleanup.callback(background.join, patience=5.0)
        study.reap()
        if retry_failed:
            study.retry_failed()
        attended, before = study.attended(), study.result()
        work = place.work / before.title
        sweep(work, study)
        background.submit(tracker.open_study, before, spec, prepared.data, prepared.split)
        if not join:
            background.submit(tracker.reconcile, before, spec, leave=attended)
        kept = background.submit(tracker.kept_models, before)
        finished = sum(trial.state.finished for trial in before.counted)
        left = max(1, budget - finished, len(finalists(spec, before)))
        devices = (
            [cluster.device] * cluster.fit(workers, most=left)
            if cluster
            else _assign(workers, prepared.devices, most=left)
        )
        threads = max(1, cores() // len(devices))
        # Of trainings that share their computation nobody could say whose time is whose.
        places = Places(1 if workers == 0 or profile else stack or 1)
        if stack is None and workers != 0 and not profile and not cluster:
            most = most_places(spec, left=left, workers=len(devices), by_default=workers is None)
            job = helper.submit(measure_stack, spec, prepared.data, devices[0], threads, most)
            places = await_job(job, helper, say, interrupted)
        opened = StudyOpened(
            study=before,
            data=prepared.data,
            split=prepared.split,
            budget=budget,
            finished=finished,
            workers=len(devices),
            device=str(cluster or ", ".join(dict.fromkeys(devices))),
            stack=places.count,
            alone=places.reason,
        )
        say(opened)
        for note in study.notes:
            say(Notice(note))
        keeper = Keeper(tracker, background, helper, spec, data=prepared.data, watch=say)
        keeper.resume(before, kept, leave=attended)
        profiler = profiling.Profiler()
        engine: Engine
        if cluster is not None:
            engine = cluster.workers(spec, prepared.data, slots=len(devices), say=tell)
        elif workers == 0:
            engine = InProcess(devices[0])
        else:
            engine = LocalProcesses(devices, threads=threads, places=places.count, context=context)
        cleanup.callback(engine.close)

        def hear(event: Event) -> None:
            profiler.hear(event)
            say(event)

        supervisor = Supervisor(
            spec,
            study,
            engine,
            data=prepared.data,
            budget=budget,
            deadline=deadline,
            interrupted=interrupted,
            tracker=tracker,
            background=background,
            keeper=keeper,
            work=work,
            watch=hear,
            profile=profile,
        )
        reason = supervisor.run()
        profiler.stop()
        patience = 5.0 if reason in ("interrupted", "stopped") else PATIENCE
        orderly = reason in ("budget", "exhausted", "timeout")
        sums_up = not join or (orderly and study.claim_end())
        attended, after = study.attended(), study.result()
        pictures = pictures_folder(work, study)
        drawing = helper.submit(draw_study, after, pictures) if sums_up else None
        if sums_up:
            # What other runs of the study have left since this one began.
            background.submit(tracker.reconcile, after, spec, leave=attended)
        keeper.resume(after, background.submit(tracker.kept_models, after), leave=attended)
        deleted = background.submit(tracker.deleted_runs, after)
        background.settle(patience=patience, hear=tell)
        keeper.collect(wait=True)
        outcome = race(spec, after, data=prepared.data)
        remarks = [str(outcome)] * bool(outcome) + stage_warnings(after)
        for text in remarks:
            say(Notice(text))
        winner = outcome.winner if outcome else None if spec.final else after.best
        registered = None
        early = join and reason == "timeout"  # the study goes on without us: its best is not known yet
        if winner is not None and orderly and not early and keeper.keeps(winner):
            registered = background.submit(tracker.register, after, winner.number)
        elif winner is not None and orderly and winner.number in _answer(deleted):
            lost = _answer(deleted)[winner.number]
            say(
                Notice(
                    f"the run of trial {winner.number}, the best, was deleted in MLflow, so its model is not "
                    f"registered. Bring it back: mlflow runs restore --run-id {lost}, then run again"
                )
            )
        elif winner is not None and orderly and sums_up and place.shared and not early and spec.keep.models != "none":
            say(
                Notice(
                    f"the model of trial {winner.number}, the best, is not in MLflow yet: the machine that trained it "
                    f"logs and registers it at its end, or with its next hpo run {after.name}. If it is lost, have "
                    f"the best trial trained again: hpo run {after.name} --set final.seeds=1"
                )
            )
        if drawing is not None:
            text = study_summary(after, winner=winner, model=after.name if registered else "", remarks=remarks)
            status, figures = "FINISHED" if orderly else "KILLED", _drawn(drawing, say)
            background.submit(tracker.close_study, after, status=status, summary=text, figures=figures)
        last: list[Event] = []
        if profile:
            beside = [(clock.seconds, clock.cpu_seconds), helper.submit(spent).result()]
            profiled = profiler.sum_up(workers=len(devices), beside=beside)
            background.submit(tracker.log_profile, after, profiled)
            last.append(profiled)
        background.join(patience=patience, hear=tell)
        shutil.rmtree(pictures, ignore_errors=True)
        sweep(work, study)
        for notice in helper.notices():
            say(notice)
        known = registered is not None and registered.done() and registered.exception() is None
        model = registered.result() if registered is not None and known else None
        for event in (*last, StudyEnded(after, reason, model)):
            say(event)
        return after


def refuse_new(home: Home, spec: StudySpec, data: DataCard, *, fresh: bool) -> None:
    """Refuse to begin a study on parts that share images; one that has begun goes on. Raises DataError."""
    if data.shared and (fresh or spec.name not in {each.study.name for each in look(home, results=False)}):
        refuse_shared(data)


def _answer(asked: Future[dict[int, str]]) -> dict[int, str]:
    """What the tracker has answered; {} where it is not reached."""
    return asked.result() if asked.done() and asked.exception() is None else {}


def _ignore(event: Event) -> None:
    """Nobody watches."""


def with_options(spec: StudySpec, *, trials: int | None, keep_models: str | None, precision: str | None) -> StudySpec:
    """The spec with what the command line says instead of the file. Raises SpecError."""
    if trials is not None:
        if trials < 1:
            raise SpecError(f"--trials {trials}: is not positive.", "Give the study's total, such as --trials 50.")
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


def _assign(workers: int | None, devices: Sequence[str], *, most: int) -> list[str]:
    """One device for each worker, round robin: by default one worker for each GPU, or for each core, `most` at most."""
    if workers is None:
        workers = cores() if devices[0] == "cpu" else len(devices)
    return [devices[slot % len(devices)] for slot in range(max(1, min(workers, most)))]


def await_job(job: Job, helper: Helper, say: Watch, interrupted: threading.Event) -> Any:
    """The helper's answer; what it says meanwhile is passed on."""
    while True:
        for notice in helper.notices():
            say(notice)
        if interrupted.is_set():
            raise KeyboardInterrupt
        with contextlib.suppress(TimeoutError):
            return job.result(timeout=0.1)


def _drawn(drawing: Job, say: Watch) -> list[Path]:
    """The study's pictures; a helper that died over them is told, and ends no study."""
    if (error := drawing.exception()) is not None:
        say(Notice(f"the study's pictures could not be drawn: {error}"))
        return []
    files: list[Path] = drawing.result()
    return files


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event; a second Ctrl-C ends the process the usual way."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # signals belong to the main thread
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:  # noqa: ARG001 - the signature that signal wants
        # Schedulers send SIGTERM more than once; to end it at once they have SIGKILL.
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
