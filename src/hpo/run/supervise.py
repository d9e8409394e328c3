"""The loop that owns a study: ask, hand out, report or prune, tell, record, until the budget is spent."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from hpo.records import (
    Candidate,
    DataCard,
    EpochEnded,
    Event,
    Notice,
    TrialEnded,
    TrialResult,
    TrialStarted,
    TrialState,
)
from hpo.run.background import Background
from hpo.run.engines import Engine, Message, WorkerLost
from hpo.run.keep import Keeper
from hpo.run.worker import Task
from hpo.search.ask import Study
from hpo.spec.study import Setup, StudySpec
from hpo.track.tracker import Tracker

Watch = Callable[[Event], None]

# So many failures before the first success mean that the study itself is wrong, not its candidates.
_HOPELESS = 5
_TICK = 0.2  # seconds; how soon Ctrl-C, --timeout and finished exports are noticed
_REAP = 15.0  # seconds between looks for trials of other supervisors that died


@dataclass
class _Running:
    candidate: Candidate
    setup: Setup
    started: float
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
        self._work = work
        self._watch = watch
        self._prunes = spec.search.pruner.name != "none"
        self._running: dict[int, _Running] = {}
        self._precisions: dict[str, str] = {}
        self._best: float | None = None
        self._failed = 0
        self._succeeded = False
        for trial in study.result().trials:
            if trial.result is not None:
                self._remember(trial.result)

    def run(self) -> str:
        """Work until nothing is left to do; returns budget, exhausted, timeout, interrupted or failing."""
        reaped = time.monotonic()
        while True:
            if time.monotonic() - reaped > _REAP:
                self._study.reap()
                reaped = time.monotonic()
            reason = self._reason_to_stop()
            if reason:
                self._stop_running(reason)
                return reason
            self._hand_out()
            if not self._running:
                return "exhausted" if self._study.exhausted else "budget"
            for slot, message in self._engine.poll(_TICK):
                self._handle(slot, message)
            self._keeper.collect()
            for failure in self._background.failures():
                self._watch(Notice(f"tracking: {failure} The next hpo run of this study mends it."))

    def _reason_to_stop(self) -> str:
        if self._interrupted.is_set():
            return "interrupted"
        if time.monotonic() >= self._deadline:
            return "timeout"
        if self._failed >= _HOPELESS and not self._succeeded:
            return "failing"
        return ""

    def _hand_out(self) -> None:
        for slot in range(self._engine.slots):
            if slot in self._running:
                continue
            worker = f"worker {slot}"
            candidate = self._study.ask(budget=self._budget, worker=worker)
            if candidate is None:
                return
            setup = self._spec.with_values(candidate.parameters)
            task = Task(
                number=candidate.number,
                setup=setup,
                seed=candidate.seed,
                data=self._data,
                objective=self._spec.search.objective,
                folder=str(self._work / str(candidate.number)),
                precisions=dict(self._precisions),
                wait=self._prunes,
            )
            self._engine.submit(slot, task)
            self._running[slot] = _Running(candidate, setup, time.monotonic())
            self._background.submit(self._tracker.start_trial, candidate, setup, worker=worker)
            self._watch(TrialStarted(candidate, worker))

    def _handle(self, slot: int, message: Message) -> None:
        running = self._running[slot]
        if isinstance(message, EpochEnded):
            running.epochs.append(message)
            value = message.epoch.scores[self._spec.search.objective]
            prune = self._study.report(message.number, message.epoch.number, value)
            if self._prunes:
                self._engine.verdict(slot, go_on=not prune)
            self._watch(message)
        elif isinstance(message, WorkerLost):
            code = message.exitcode or 0
            cause = f"signal {-code}" if code < 0 else f"exit code {code}"
            self._end(slot, self._stopped(running, f"its worker died ({cause})"))
        else:
            self._end(slot, message.result)

    def _stopped(self, running: _Running, reason: str) -> TrialResult:
        return TrialResult(
            running.candidate.number,
            TrialState.STOPPED,
            epochs=tuple(message.epoch for message in running.epochs),
            seconds=time.monotonic() - running.started,
            reason=reason,
        )

    def _end(self, slot: int, result: TrialResult) -> None:
        if result.value is not None and not math.isfinite(result.value):
            reason = f"{self._spec.search.objective} is {result.value}"
            result = replace(result, state=TrialState.FAILED, value=None, reason=reason)
        running = self._running.pop(slot)
        self._study.tell(result)
        self._background.submit(self._tracker.log_epochs, result.number, result.epochs)
        self._background.submit(self._tracker.end_trial, result)
        best = self._remember(result)
        self._keeper.add(result, running.setup)
        self._watch(TrialEnded(result, best=best))

    def _remember(self, result: TrialResult) -> bool:
        """Note what later trials need of this one; True if it is the best so far."""
        self._failed += result.state is TrialState.FAILED
        self._succeeded |= result.state in (TrialState.COMPLETE, TrialState.PRUNED)
        if key := result.settings.get("precision_key"):
            self._precisions.setdefault(key, result.settings["precision"])
        if result.state is not TrialState.COMPLETE or result.value is None:
            return False
        sign = 1 if self._spec.search.better == "maximize" else -1
        if self._best is None or sign * result.value > sign * self._best:
            self._best = result.value
            return True
        return False

    def _stop_running(self, reason: str) -> None:
        self._engine.close()
        for slot, running in list(self._running.items()):
            self._end(slot, self._stopped(running, reason))
