"""The loop that owns a study: it asks for candidates, hands them to workers, prunes, and tells Optuna the results."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from hpo.errors import NO_SPACE, HpoError, SpecError, StoreError
from hpo.events import EpochEnded, Notice, TrialEnded, TrialPaused, TrialsReaped, TrialStarted
from hpo.execute.engines.base import Engine, Message, WorkerLost
from hpo.execute.enough import Enough
from hpo.execute.finals import final_setup, finalists, with_final
from hpo.execute.pauses import Pauses, is_known
from hpo.execute.process import RunEnd
from hpo.execute.progress import Progress
from hpo.execute.subscribers import Events
from hpo.execute.workdir import checkpoint_file
from hpo.execute.workers.task import Task
from hpo.records import (
    FINAL,
    Candidate,
    DataCard,
    EndReason,
    FailureKind,
    TrialResult,
    TrialState,
)
from hpo.report.text import counted
from hpo.search.constraints import most_parameters, needs_latency
from hpo.search.pruners import report_values
from hpo.search.results import misfit
from hpo.search.study import Study
from hpo.spec.automatic import prunes
from hpo.spec.study import Setup, StudySpec

_TICK = 0.2  # seconds; how soon Ctrl-C, --timeout and finished exports are noticed
_REAP, _LONGEST_REAP = 15.0, 120.0  # seconds between searches for trials of dead supervisors; the longer, the more run
_LONGEST_WAIT = 5.0  # seconds between questions for a candidate to a server that has none now


class Ask(Protocol):
    """Gives a worker's next candidate, or None where there is none now."""

    def __call__(self, *, worker: str) -> Candidate | None:
        """The candidate, handed out in the worker's name."""


@dataclass
class _RunningTrial:
    candidate: Candidate
    setup: Setup
    started: float
    found_by_search: float | None = None  # see _found_by_search
    epochs: list[EpochEnded] = field(default_factory=list)
    before: TrialResult | None = None  # when it was paused


class Supervisor:
    """One run of a study: it hands candidates to the engine's slots, tells Optuna the results, and emits events.

    budget is the study's total number of trials. work is the study's folder of work in progress. ranks is that of Task.
    search_until is when the search hands out its last candidate, a time.monotonic() value: final trainings follow.
    retried: failed candidates wait, which are tried again also where the search has ended before its budget was spent.
    Every result is in Optuna's storage before its event is emitted.
    """

    def __init__(
        self,
        spec: StudySpec,
        study: Study,
        engine: Engine,
        *,
        data: DataCard,
        work: Path,
        events: Events,
        budget: int,
        end: RunEnd,
        profile: bool = False,
        ranks: int = 1,
        search_until: float = math.inf,
        retried: bool = False,
    ) -> None:
        self._spec = spec
        self._study = study
        self._engine = engine
        self._data = data
        self._work = work
        self._events = events
        self._budget = budget
        self._end = end
        self._profile = profile
        self._ranks = ranks
        self._search_until, self._retried = search_until, retried
        self._prunes = prunes(spec)
        self._pauses = Pauses(spec, study, work)
        self._running: dict[int, _RunningTrial] = {}  # by slot
        self._progress = Progress(spec, study.result())
        self._enough = Enough(spec, study)
        self._may_reach = True  # whether search.until and enough end what runs now: not the final trainings

    def run(self) -> EndReason:
        """Search, then train the finals; returns why the run ended.

        Raises StoreError where the study storage or the disk refuses for good, and another HpoError where no worker can
        train this study. Results that have arrived are on disk by then, and the next run tells them to Optuna.
        """
        try:
            return self._search()
        except HpoError as error:
            self._leave_all(f"the run ended: {error.message}")
            raise
        except KeyboardInterrupt:
            self._leave_all(EndReason.INTERRUPTED)
            raise

    def _search(self) -> EndReason:
        ask = partial(self._study.ask, budget=self._budget, resumable=self._pauses.has_checkpoint)
        if self._retried and self._fulfilled():
            self._may_reach = False
            self._run_phase(partial(ask, budget=len(self._study.result().counted)))
            self._may_reach = True
        reason = self._run_phase(ask)
        late = self._late and self._end.reason() is None
        if reason.completed or late:
            for result in self._study.end_search():
                self._emit_ended(result, final=False)
        chosen = finalists(self._spec, self._study.result()) if reason.completed or late else []
        self._may_reach = False
        if not chosen:
            return reason
        self._study.enqueue_finals(chosen)
        ended = self._run_phase(self._study.ask_final)
        return reason if ended.completed else ended

    def _run_phase(self, ask: Ask) -> EndReason:
        """Hand out the candidates of ask until there are none and no trial is running."""
        reap_at, ask_at, wait = time.monotonic() + _REAP, 0.0, _TICK
        while True:
            if time.monotonic() > reap_at:
                self._reap()
                ask_at = 0.0
                crowd = self._study.crowd if self._study.shared else 1
                reap_at = time.monotonic() + min(_REAP * max(1, crowd), _LONGEST_REAP)
            if reason := self._reason_to_stop():
                self._stop_running(reason)
                return reason
            if self._late:
                if not self._running:
                    return EndReason.TIMEOUT
            elif fulfilled := self._fulfilled():
                # The engine of stopped trials is closed; a final training needs it.
                if self._running and self._spec.final is None:
                    self._stop_running(fulfilled)
                if not self._running:
                    return fulfilled
            elif time.monotonic() >= ask_at:
                handed = self._hand_out(ask)
                idle = not self._running and any(map(self._engine.accepts, range(self._engine.slots)))
                if idle and not self._study.blocked:
                    return EndReason.EXHAUSTED if self._study.exhausted else EndReason.BUDGET
                # The next candidate waits for trials of another supervisor: a server must not be asked constantly.
                wait = min(2 * wait, _LONGEST_WAIT) if self._study.shared and not handed else _TICK
                ask_at = time.monotonic() + (wait if self._study.shared and self._study.blocked else 0.0)
            if not self._running:
                self._end.interrupted.wait(_TICK)
            busy = len(self._running)
            for slot, message in self._engine.poll(_TICK):
                self._handle(slot, message)
            if len(self._running) < busy:
                ask_at = 0.0
            self._events.poll()

    def _reap(self) -> None:
        """Finish or retry the trials of supervisors that have died since the last look."""
        reaped = self._study.reap()
        if reaped or self._study.shared:
            self._enough.note()
        if not (reaped or (self._study.shared and self._spec.search.until is not None)):
            return
        study = self._study.result()
        if study.best is not None and study.best.result is not None:  # perhaps of another supervisor
            self._progress.note(study.best.result.value)
        if reaped:
            self._events.emit(TrialsReaped(study, frozenset(self._study.trials_of_others())))

    def _reason_to_stop(self) -> EndReason | None:
        return self._end.reason() or (EndReason.FAILING if self._progress.hopeless else None)

    @property
    def _late(self) -> bool:
        """Whether the time of the search is over, and what is left is for final trainings."""
        return self._may_reach and time.monotonic() >= self._search_until

    def _fulfilled(self) -> EndReason | None:
        """Why the search may end before its budget is spent; None where it may not."""
        if not self._may_reach:
            return None
        if self._progress.reached:
            return EndReason.REACHED
        return EndReason.ENOUGH if self._enough.reached() else None

    def _hand_out(self, ask: Ask) -> bool:
        """Fill the slots as far as there are candidates; True if there were any."""
        handed = False
        for slot in range(self._engine.slots):
            if slot in self._running or not self._engine.accepts(slot):
                continue
            worker = f"worker {slot}"
            candidate = ask(worker=worker)
            self._emit_reused(worker)
            if candidate is None:
                break
            handed = True
            self._start(slot, candidate, worker)
        return handed

    def _start(self, slot: int, candidate: Candidate, worker: str) -> None:
        final = candidate.stage == FINAL
        try:
            setup = self._setup(candidate)
        except SpecError as error:
            self._events.emit(TrialStarted(candidate, worker, None, time.time()))
            self._emit_ended(self._study.tell(misfit(candidate.number, error)), final=final)
            return
        task = Task(
            number=candidate.number,
            setup=setup,
            seed=candidate.seed,
            data=self._data,
            folder=str(self._work / str(candidate.number)),
            until=None if final else self._until(setup),
            precisions=dict(self._progress.precisions),
            most_parameters=float("inf") if final else most_parameters(self._spec),
            latency=needs_latency(self._spec),
            wait=self._prunes and not final,
            checkpoint=str(checkpoint_file(self._work, candidate)),
            pausable=self._pauses.allowed and self._prunes and not final,
            profile=self._profile,
            # It may have killed the process that it shared with others.
            exclusive=candidate.deaths > 0,
            ranks=self._ranks,
        )
        self._engine.submit(slot, task)
        self._running[slot] = _RunningTrial(
            candidate,
            setup,
            time.monotonic(),
            self._found_by_search(candidate),
            before=self._study.before_pause(candidate.number),
        )
        self._events.emit(TrialStarted(candidate, worker, setup, time.time()))

    def _until(self, setup: Setup) -> float | None:
        """The value of its monitor with which a training has what search.until asks for, if one epoch can tell."""
        search = self._spec.search
        one_epoch = setup.training.monitor == search.objective and setup.split.kind != "kfold"
        return search.until if one_epoch and not (search.constraints or search.objectives) else None

    def _setup(self, candidate: Candidate) -> Setup:
        if candidate.stage == FINAL:
            spec = with_final(self._spec, candidate)
            return final_setup(spec, self._study.result(), candidate.parameters, data=self._data)
        return self._spec.with_values(candidate.parameters)

    def _found_by_search(self, candidate: Candidate) -> float | None:
        """The objective that the search found for a final candidate: trained on all images, it has no other value."""
        if candidate.stage != FINAL:
            return None
        ranked = self._study.result().ranked()
        return next((trial.value for trial in ranked if trial.candidate.parameters == candidate.parameters), None)

    def _emit_reused(self, worker: str) -> None:
        """Emit the events of candidates that the study answered itself, with an earlier result."""
        for candidate, result in self._study.take_reused():
            setup = self._spec.with_values(candidate.parameters)
            self._events.emit(TrialStarted(candidate, worker, setup, result.ended))
            self._events.emit(TrialEnded(result))

    def _handle(self, slot: int, message: Message) -> None:
        trial = self._running[slot]
        if isinstance(message, EpochEnded):
            position = (message.epoch.fold, message.epoch.number)
            # A training that begins again with smaller pieces reports its epochs again.
            trial.epochs = [other for other in trial.epochs if (other.epoch.fold, other.epoch.number) < position]
            trial.epochs.append(message)
            if self._prunes and is_known(message.epoch, trial.before):
                self._engine.verdict(slot, go_on=True)
                return
            prune = trial.candidate.stage != FINAL and self._report(trial, message)
            if self._prunes and trial.candidate.stage != FINAL:
                self._engine.verdict(slot, go_on=not prune)
            self._events.emit(message)
        elif isinstance(message, WorkerLost):
            lost = self._stopped(trial, f"its worker died ({message.cause})", FailureKind.WORKER_DIED)
            self._finish(slot, replace(lost, traceback=message.traceback), died=True)
        else:
            self._finish(slot, message.result)
            if message.result.state is TrialState.STOPPED:  # by its worker, whose disk is full
                raise StoreError(message.result.reason, NO_SPACE)

    def _report(self, trial: _RunningTrial, message: EpochEnded) -> bool:
        """Report an epoch to the pruner; True: prune the trial now."""
        epochs = [ended.epoch for ended in trial.epochs]
        reported = report_values(self._spec, trial.setup, epochs, message.costs)
        return reported is not None and self._study.report(message.number, *reported)

    def _stopped(self, trial: _RunningTrial, reason: str, failure: FailureKind) -> TrialResult:
        return TrialResult(
            trial.candidate.number,
            TrialState.STOPPED,
            epochs=tuple(message.epoch for message in trial.epochs),
            seconds=time.monotonic() - trial.started,
            reason=reason,
            failure=failure,
        )

    def _finish(self, slot: int, result: TrialResult, *, died: bool = False) -> None:
        """Tell Optuna first: what subscribers then fail to write, the next run finds in its storage."""
        trial = self._running[slot]
        with self._end.shielded():
            try:
                result = self._study.tell(self._stamped(result, trial), died=died)
            finally:
                del self._running[slot]  # where the storage refuses, tell has left the result on disk
        self._enough.note()
        if result.state is not TrialState.PAUSED:
            self._emit_ended(result, final=trial.candidate.stage == FINAL)
            return
        self._progress.add(result, final=False)
        self._events.emit(TrialPaused(result))
        for ended in self._study.end_paused(numbers) if (numbers := self._pauses.too_many()) else ():
            self._emit_ended(ended, final=False)

    def _emit_ended(self, result: TrialResult, *, final: bool) -> None:
        self._events.emit(TrialEnded(result, best=self._progress.add(result, final=final)))

    def _stamped(self, result: TrialResult, trial: _RunningTrial) -> TrialResult:
        """The result with the time of its end, and with the search's value where a final training has none.

        A pruned trial that may continue becomes a paused one, and one that was paused has the seconds of all its parts.
        """
        result = self._pauses.settled(result, trial.candidate, trial.before)
        missing = result.value is None and self._spec.search.objective not in result.scores
        value = trial.found_by_search if missing else result.value
        return replace(result, value=value, ended=time.time())

    def _leave_all(self, reason: str) -> None:
        """Write results that have arrived meanwhile to disk for the next run, and the other trials as stopped."""
        for slot, result in self._arrived():
            self._study.leave(self._stamped(result, self._running.pop(slot)))
        self._engine.close()
        for trial in self._running.values():
            self._study.leave(self._stopped(trial, reason, FailureKind.INTERRUPTED))

    def _arrived(self) -> Iterator[tuple[int, TrialResult]]:
        """The slots and results of trials that have ended and are not recorded yet."""
        deadline = time.monotonic() + 1.0
        while self._running and time.monotonic() < deadline and (messages := self._engine.poll(0.0)):
            yield from ((slot, message.result) for slot, message in messages if isinstance(message, TrialEnded))

    def _stop_running(self, reason: EndReason) -> None:
        """Record the running trials as stopped, but those that have ended meanwhile as what they are."""
        if reason.by_user and self._running:
            self._events.emit(Notice(f"stopping: saving {counted(len(self._running), 'trial')}; Ctrl-C again ends now"))
        for slot, result in self._arrived():
            self._finish(slot, result)
        self._engine.close()
        for slot, trial in list(self._running.items()):
            self._finish(slot, self._stopped(trial, reason, FailureKind.INTERRUPTED))
