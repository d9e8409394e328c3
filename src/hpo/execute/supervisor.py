"""The loop that owns a study: ask, hand out, report or prune, tell, record, until the budget is spent."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from hpo.errors import NO_SPACE, HpoError, StoreError
from hpo.execute.checkpoints import checkpoint_file, drop_finished
from hpo.execute.engines.local import Engine, Message, WorkerLost
from hpo.execute.finals import final_setup, finalists
from hpo.execute.subscribers.model_retention import Keeper
from hpo.execute.tracking_queue import Background
from hpo.execute.workers.task import Task
from hpo.records import (
    FINAL,
    Candidate,
    DataCard,
    EpochEnded,
    Event,
    FailureKind,
    Notice,
    TrialEnded,
    TrialResult,
    TrialStarted,
    TrialState,
)
from hpo.search.constraints import judge, most_parameters, needs_latency
from hpo.search.pruners import report_step
from hpo.search.study import Study
from hpo.spec.study import Setup, StudySpec
from hpo.tracking.tracker import Tracker

Watch = Callable[[Event], None]

# So many failures before the first success mean that the study itself is wrong, not its candidates.
_HOPELESS = 5
_TICK = 0.2  # seconds; how soon Ctrl-C, --timeout and finished exports are noticed
_REAP, _LONGEST_REAP = 15.0, 120.0  # seconds between looks for trials of other supervisors that died; of many, in turn
_STOP, _SHARED_STOP = 2.0, 10.0  # seconds between looks for a stop asked for elsewhere
_LONGEST_WAIT = 5.0  # seconds between questions for a candidate to a server that has none now


class Ask(Protocol):
    """Gives a worker's next candidate, or None where there is none now."""

    def __call__(self, *, worker: str) -> Candidate | None:
        """The candidate, handed out in the worker's name."""


@dataclass
class _Running:
    candidate: Candidate
    setup: Setup
    started: float
    searched: float | None = None  # what the search found for a final candidate
    epochs: list[EpochEnded] = field(default_factory=list)


class Supervisor:
    """One run of a study: candidates go to the engine's slots, what became of them to Optuna and the tracker.

    budget is the study's total number of trials; deadline is a time.monotonic() value or inf.
    """

    def __init__(
        self,
        spec: StudySpec,
        study: Study,
        engine: Engine,
        *,
        data: DataCard,
        budget: int,
        deadline: float,
        interrupted: threading.Event,
        tracker: Tracker,
        background: Background,
        keeper: Keeper,
        work: Path,
        watch: Watch,
        profile: bool = False,
    ) -> None:
        self._spec = spec
        self._study = study
        self._engine = engine
        self._data = data
        self._budget = budget
        self._deadline = deadline
        self._interrupted = interrupted
        self._tracker = tracker
        self._background = background
        self._keeper = keeper
        self._folder = work
        self._watch = watch
        self._profile = profile
        self._prunes = spec.search.pruner.name != "none"
        self._running: dict[int, _Running] = {}
        self._precisions: dict[str, str] = {}
        self._best: float | None = None
        self._failed = 0
        self._succeeded = False
        self._looked = time.monotonic()
        before = study.result()
        drop_finished(work, before)
        for trial in before.trials:
            if trial.result is not None:
                self._remember(trial.result, final=trial.candidate.stage == FINAL)
        self._failed = 0  # what failed before may have been mended since

    def run(self) -> str:
        """Search, then train the finals; returns budget, exhausted, timeout, interrupted, stopped or failing.

        Raises StoreError where the study storage or the disk refuses for good, and another HpoError where no worker can
        train this study; what has come in is on disk by then, and the next run tells it.
        """
        try:
            return self._search()
        except HpoError as error:
            self._leave_all(f"the run ended: {error.message}")
            raise

    def _search(self) -> str:
        reason = self._work(partial(self._study.ask, budget=self._budget))
        if reason != "budget" and reason != "exhausted":
            return reason
        chosen = finalists(self._spec, self._study.result())
        if not chosen:
            return reason
        self._study.enqueue_finals(chosen)
        ended = self._work(self._study.ask_final)
        return reason if ended in ("budget", "exhausted") else ended

    def _work(self, ask: Ask) -> str:
        """Hand out what ask gives until it gives nothing and nothing runs."""
        reap_at, ask_at, wait = time.monotonic() + _REAP, 0.0, _TICK
        while True:
            if time.monotonic() > reap_at:
                self._reap()
                ask_at = 0.0
                crowd = self._study.crowd if self._study.shared else 1
                reap_at = time.monotonic() + min(_REAP * max(1, crowd), _LONGEST_REAP)
            reason = self._reason_to_stop()
            if reason:
                self._stop_running(reason)
                return reason
            if time.monotonic() >= ask_at:
                handed = self._hand_out(ask)
                idle = not self._running and any(map(self._engine.accepts, range(self._engine.slots)))
                if idle and not self._study.blocked:
                    return "exhausted" if self._study.exhausted else "budget"
                # What comes next waits for trials of another supervisor: a crowd must not ask a server all the time.
                wait = min(2 * wait, _LONGEST_WAIT) if self._study.shared and not handed else _TICK
                ask_at = time.monotonic() + (wait if self._study.shared and self._study.blocked else 0.0)
            if not self._running:
                self._interrupted.wait(_TICK)
            busy = len(self._running)
            for slot, message in self._engine.poll(_TICK):
                self._handle(slot, message)
            if len(self._running) < busy:
                ask_at = 0.0
            self._keeper.collect()
            for text in self._background.news():
                self._watch(Notice(text))

    def _reap(self) -> None:
        """Settle what a supervisor that died beside this one has left, in the tracker too."""
        if self._study.reap():
            self._background.submit(
                self._tracker.reconcile, self._study.result(), self._spec, leave=self._study.attended()
            )

    def _reason_to_stop(self) -> str:
        if self._interrupted.is_set():
            return "interrupted"
        if time.monotonic() >= self._deadline:
            return "timeout"
        if self._failed >= _HOPELESS and not self._succeeded:
            return "failing"
        if time.monotonic() - self._looked > (_SHARED_STOP if self._study.shared else _STOP):
            self._looked = time.monotonic()
            with contextlib.suppress(StoreError):  # what refuses now is told by the next ask
                if self._study.stop_asked():
                    return "stopped"
        return ""

    def _hand_out(self, ask: Ask) -> bool:
        """Fill the slots as far as there are candidates; whether there were any."""
        handed = False
        for slot in range(self._engine.slots):
            if slot in self._running or not self._engine.accepts(slot):
                continue
            worker = f"worker {slot}"
            candidate = ask(worker=worker)
            self._tell_reused(worker)
            if candidate is None:
                break
            handed = True
            final = candidate.stage == FINAL
            setup = self._setup(candidate)
            task = Task(
                number=candidate.number,
                setup=setup,
                seed=candidate.seed,
                data=self._data,
                folder=str(self._folder / str(candidate.number)),
                precisions=dict(self._precisions),
                most_parameters=float("inf") if final else most_parameters(self._spec),
                latency=needs_latency(self._spec),
                wait=self._prunes and not final,
                checkpoint=str(checkpoint_file(self._folder, candidate)),
                profile=self._profile,
                # Whoever may have taken others down with it is not put beside others again.
                alone=candidate.deaths > 0,
            )
            self._engine.submit(slot, task)
            self._running[slot] = _Running(candidate, setup, time.monotonic(), self._searched(candidate))
            self._background.submit(self._tracker.start_trial, candidate, setup, worker=worker, started=time.time())
            self._watch(TrialStarted(candidate, worker))
        return handed

    def _setup(self, candidate: Candidate) -> Setup:
        if candidate.stage == FINAL:
            return final_setup(self._spec, self._study.result(), candidate.parameters, data=self._data)
        return self._spec.with_values(candidate.parameters)

    def _searched(self, candidate: Candidate) -> float | None:
        """What the search found for a final candidate: trained on all images, it has no other value."""
        if candidate.stage != FINAL:
            return None
        ranked = self._study.result().ranked()
        return next((trial.value for trial in ranked if trial.candidate.parameters == candidate.parameters), None)

    def _tell_reused(self, worker: str) -> None:
        """Candidates that the study answered itself, with an earlier result."""
        for candidate, result in self._study.take_reused():
            self._background.submit(
                self._tracker.start_trial,
                candidate,
                self._spec.with_values(candidate.parameters),
                worker=worker,
                started=result.ended,
            )
            self._background.submit(self._tracker.end_trial, result)
            self._watch(TrialStarted(candidate, worker))
            self._watch(TrialEnded(result))

    def _handle(self, slot: int, message: Message) -> None:
        running = self._running[slot]
        if isinstance(message, EpochEnded):
            place = (message.epoch.fold, message.epoch.number)
            # A training that begins again with smaller pieces tells its epochs again.
            running.epochs = [told for told in running.epochs if (told.epoch.fold, told.epoch.number) < place]
            running.epochs.append(message)
            prune = running.candidate.stage != FINAL and self._report(running, message)
            if self._prunes and running.candidate.stage != FINAL:
                self._engine.verdict(slot, go_on=not prune)
            self._watch(message)
        elif isinstance(message, WorkerLost):
            died = self._stopped(running, f"its worker died ({message.cause})", FailureKind.WORKER_DIED)
            self._end(slot, replace(died, traceback=message.traceback), died=True)
        else:
            self._end(slot, message.result)
            if message.result.state is TrialState.STOPPED:  # by its worker, which has no room
                raise StoreError(message.result.reason, NO_SPACE)

    def _report(self, running: _Running, message: EpochEnded) -> bool:
        """Report an epoch to the pruner; True: prune the trial now."""
        step = report_step(self._spec, running.setup, [ended.epoch for ended in running.epochs])
        return step is not None and self._study.report(message.number, *step)

    def _stopped(self, running: _Running, reason: str, failure: FailureKind) -> TrialResult:
        return TrialResult(
            running.candidate.number,
            TrialState.STOPPED,
            epochs=tuple(message.epoch for message in running.epochs),
            seconds=time.monotonic() - running.started,
            reason=reason,
            failure=failure,
        )

    def _end(self, slot: int, result: TrialResult, *, died: bool = False) -> None:
        running = self._running.pop(slot)
        result = replace(self._valued(result, running), ended=time.time())
        result = self._study.tell(result, died=died)
        if result.state.finished:
            checkpoint_file(self._folder, running.candidate).unlink(missing_ok=True)
        self._background.submit(self._tracker.log_epochs, result.number, result.epochs, ended=result.ended)
        self._background.submit(self._tracker.end_trial, result)
        final = running.candidate.stage == FINAL
        best = self._remember(result, final=final)
        self._keeper.add(result, final=final)
        self._watch(TrialEnded(result, best=best))

    def _valued(self, result: TrialResult, running: _Running) -> TrialResult:
        """The result with the objective as its value, and judged by the constraints."""
        if result.state not in (TrialState.COMPLETE, TrialState.PRUNED):
            return result
        objective = self._spec.search.objective
        value = result.scores.get(objective)
        value = running.searched if value is None else value
        if result.state is TrialState.COMPLETE and (value is None or not math.isfinite(value)):
            reason = f"{objective} is {value}"
            return replace(result, state=TrialState.FAILED, reason=reason, failure=FailureKind.NOT_FINITE)
        return judge(self._spec, replace(result, value=value))

    def _remember(self, result: TrialResult, *, final: bool) -> bool:
        """Note what later trials need of this one; True if it is the best of the search so far."""
        # One that is pruned for want of memory is no success.
        self._failed += result.state is TrialState.FAILED or (result.state.finished and result.failure is not None)
        self._succeeded |= result.state in (TrialState.COMPLETE, TrialState.PRUNED) and result.failure is None
        if key := result.settings.get("precision_key"):
            self._precisions.setdefault(key, result.settings["precision"])
        if final or result.state is not TrialState.COMPLETE or result.value is None or not result.feasible:
            return False
        sign = 1 if self._spec.search.better == "maximize" else -1
        if self._best is None or sign * result.value > sign * self._best:
            self._best = result.value
            return True
        return False

    def _leave_all(self, reason: str) -> None:
        """Write what workers have finished meanwhile, and that the others were stopped, to disk for the next run."""
        deadline = time.monotonic() + 1.0
        while self._running and time.monotonic() < deadline and (messages := self._engine.poll(0.0)):
            for slot, message in messages:
                if isinstance(message, TrialEnded):
                    running = self._running.pop(slot)
                    self._study.leave(replace(self._valued(message.result, running), ended=time.time()))
        self._engine.close()
        for running in self._running.values():
            self._study.leave(self._stopped(running, reason, FailureKind.INTERRUPTED))

    def _stop_running(self, reason: str) -> None:
        self._engine.close()
        for slot, running in list(self._running.items()):
            self._end(slot, self._stopped(running, reason, FailureKind.INTERRUPTED))
