"""One study while it runs: candidates out, reports and results in, nothing lost between two processes."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import optuna
from optuna.trial import FrozenTrial

from hpo.errors import StoreError
from hpo.home import Home
from hpo.records import FINAL, Candidate, FailureKind, StudyResult, TrialResult, TrialState
from hpo.search.constraints import aims
from hpo.search.finish import Settler, template
from hpo.search.stage_progress import Plan, Step
from hpo.search.stages import Stage, stage_names, total_trials
from hpo.search.strategy import Proposer, build_pruner, decode, distribution, encode
from hpo.spec.study import StudySpec
from hpo.storage import outbox
from hpo.storage.errors import store_errors
from hpo.storage.lease import Lease, clean_leases
from hpo.storage.liveness import Roll
from hpo.storage.optuna_storage import (
    START,
    STUDY,
    Start,
    Storage,
    result_of,
    stage_of,
    start_of,
    state_of,
    to_candidate,
    to_result,
)
from hpo.storage.reader import CLAIM, STOP
from hpo.storage.trial_attrs import key_of
from hpo.storage.trial_index import Books

Method = TypeVar("Method", bound=Callable[..., Any])


def _guarded(method: Method) -> Method:
    """Storage faults become StoreError."""

    @functools.wraps(method)
    def guarded(self: Study, *args: Any, **options: Any) -> Any:
        with store_errors(self._home):
            return method(self, *args, **options)

    return cast("Method", guarded)


class Study:
    """The handle of one supervisor on one study; open_study makes it.

    title is the study's name in storage and tracking. notes are what there is to say about its start. exhausted: the
    last ask found the space spent. blocked: the last ask or ask_final had nothing to hand out, but there will be once
    running trials, perhaps another supervisor's, have ended. shared: the storage is a server's. All methods raise
    StoreError where the storage refuses.
    """

    def __init__(
        self, home: Home, spec: StudySpec, storage: Storage, title: str, lease: Lease, notes: Sequence[str] = ()
    ) -> None:
        self.title = title
        self.notes = list(notes)
        self.exhausted = False
        self.blocked = False
        self._home = home
        self._spec = spec
        self._aims = aims(spec)
        self._storage = storage
        self._lease = lease
        self._id: int = storage.get_study_id_from_name(title)
        self._study = optuna.load_study(study_name=title, storage=storage, pruner=build_pruner(spec))
        self._plan = Plan(spec, storage, self._id)
        self._running: dict[int, Any] = {}
        self._reused: list[tuple[Candidate, TrialResult]] = []
        self._stop = self._last_stop()
        self.shared = storage.shared
        # Elsewhere trials end when their machine does: who is left must be there to try them again.
        self._waits = self.shared or spec.final is not None
        self._roll = Roll(storage, self._id, lease, lambda: list(self._running.values()))
        self._settler = Settler(spec, storage, self._study, lease=lease.name)

    @_guarded
    def reap(self) -> list[int]:
        """Settle running trials whose supervisor is gone, and return their numbers; result() says how each stands.

        A trial whose result had been written, or left (see tell), is told as that result. Any other is stopped and a
        retry of it enqueued, or failed once its process has died three times. A trial of a living supervisor is never
        touched: for half a minute after this handle was opened, or a server was away, nobody elsewhere counts as dead.
        """
        if not self._gone() and not outbox.left(self._home, self.title):
            return []  # without the lock: many supervisors look, and hardly ever is there anything
        try:
            numbers, known = self._storage.at_once(self._reap, lock=self._lock)
        except optuna.exceptions.UpdateFinishedTrialError:
            return []  # one of them was told just now: the next look sees who is left
        outbox.forget(self._home, self.title, known)  # not before it is sure: a server may undo the step
        return numbers

    def listen(self) -> None:
        """Wait until reap knows of supervisors on other machines, too, whether they are dead."""
        self._roll.listen()

    def _reap(self) -> tuple[list[int], set[int]]:
        """The trials that were settled, and those whose results need not be left on disk any more."""
        trials, gone = self._trials(), self._gone()
        left = outbox.left(self._home, self.title)
        for trial in gone:
            lost = TrialResult(
                trial.number, TrialState.STOPPED, reason="its process was gone", failure=FailureKind.INTERRUPTED
            )
            known = result_of(trial) or left.get(trial.number)
            self._settler.settle(trial, known or lost, died=trial.number not in left)
        numbers = [trial.number for trial in gone]
        closed = {trial.number for trial in trials if trial.state.is_finished()}
        return numbers, left.keys() & {*numbers, *closed}

    @_guarded
    def ask(self, *, budget: int, worker: str) -> Candidate | None:
        """The next candidate of the search, in the name of a worker; None where there is nothing to hand out now.

        budget is the study's total of trials: finished ones count, running and waiting ones too; interrupted ones,
        those run again and final trainings do not. Interrupted candidates come first. Candidates that the spec says to
        answer with an earlier result are answered here: see take_reused. Raises SpecError where a stage has nothing to
        start from.
        """
        while True:
            candidate = self._hand_out(partial(self._next, budget, worker))
            earlier = self._earlier(candidate) if candidate else None
            if candidate is None or earlier is None:
                return candidate
            reason = f"same candidate as trial {earlier.number}"
            result = replace(
                earlier,
                number=candidate.number,
                epochs=(),
                seconds=0.0,
                folder="",
                reason=reason,
                traceback="",
                ended=time.time(),
            )
            self.tell(result)
            self._reused.append((candidate, result))

    def take_reused(self) -> list[tuple[Candidate, TrialResult]]:
        """Candidates that ask has answered itself since this was last called, each told as complete."""
        taken, self._reused = self._reused, []
        return taken

    @_guarded
    def enqueue_finals(self, candidates: Sequence[tuple[Mapping[str, Any], int]]) -> None:
        """Have these (parameters, seed) trained after the search; those that were enqueued before are not again."""

        def enqueue() -> None:
            finals = [start_of(trial) for trial in self._trials() if stage_of(trial) == FINAL]
            known = {(key_of(start.parameters or {}), start.seed) for start in finals}
            ordinal = sum(start.retry_of is None for start in finals)
            for parameters, seed in candidates:
                if (key_of(parameters), seed) in known:
                    continue
                known.add((key_of(parameters), seed))
                start = Start(ordinal, stage=FINAL, seed=seed, parameters=dict(parameters), lease=self._lease.name)
                self._settler.enqueue(start)
                ordinal += 1

        self._storage.at_once(enqueue, lock=self._lock)

    @_guarded
    def ask_final(self, *, worker: str) -> Candidate | None:
        """The next final training, interrupted ones included; None where none waits."""
        return self._hand_out(partial(self._next_final, worker))

    def _hand_out(self, step: Callable[[], tuple[Any, Start] | None]) -> Candidate | None:
        # Noted once it is sure: what a server has broken off is asked for again as a whole.
        found = self._storage.ask_at_once(self._id, step, lock=self._lock)
        if found is None:
            return None
        trial, start = found
        self._running[trial.number] = trial
        return to_candidate(trial.number, start)

    def _next_final(self, worker: str) -> tuple[Any, Start] | None:
        tally = self._books().tally([FINAL])
        self.blocked = not tally.waiting and tally.running > 0
        if not tally.waiting:
            return None
        trial = self._pop(FINAL, optuna.samplers.RandomSampler(seed=0))
        return self._sign(trial, Start(**trial.user_attrs[START]), worker)

    @_guarded
    def retry_failed(self) -> int:
        """Enqueue every failed candidate again, search and final trainings alike; returns how many.

        A failed trial that is run again no longer counts against the budget: its retry does.
        """

        def retry() -> int:
            trials = self._trials()
            again = {start_of(trial).retry_of for trial in trials}
            known = {*stage_names(self._spec), FINAL}
            failed = [
                trial
                for trial in trials
                if state_of(trial) is TrialState.FAILED and trial.number not in again and stage_of(trial) in known
            ]
            for trial in failed:
                self._settler.retry(trial, deaths=0)
            return len(failed)

        return self._storage.at_once(retry, lock=self._lock)

    @_guarded
    def report(self, number: int, epoch: int, value: float) -> bool:
        """Record the objective after an epoch (counted from 1; NaN and infinity allowed); True: prune the trial now.

        Final trainings are never pruned. With several objectives nothing is recorded: Optuna has no place for it.
        """
        if len(self._aims) > 1:
            return False
        trial = self._running[number]
        try:
            trial.report(value, epoch)
        except optuna.exceptions.UpdateFinishedTrialError:  # taken from us, see tell
            return True
        stage = trial.user_attrs[START]["stage"]
        self._storage.show(stage)
        return stage != FINAL and self._spec.search.pruner.name != "none" and bool(trial.should_prune())

    def tell(self, result: TrialResult, *, died: bool = False) -> TrialResult:
        """Close a trial of this handle, and return the result as it was recorded.

        died says that its worker did: a candidate whose process has died three times is failed instead. A complete
        trial without a finite value for each objective is recorded as failed. One that was taken from this handle,
        which had given no sign of life for a minute, has ended already: what was recorded then stands. Where the
        storage refuses, the result is left on disk for the next reap, and StoreError is raised.
        """
        try:
            return self._tell(result, died=died)
        except StoreError:
            self.leave(result)
            raise

    def leave(self, result: TrialResult) -> None:
        """Leave a result on disk: the first reap after this handle is closed tells it. Touches no storage."""
        outbox.leave(self._home, self.title, result)

    @_guarded
    def _tell(self, result: TrialResult, *, died: bool) -> TrialResult:
        trial_id = self._running[result.number]._trial_id
        lock = self._lock if result.state is TrialState.STOPPED else ""

        def settle() -> TrialResult:
            return self._settler.settle(self._storage.get_trial(trial_id), result, died=died)

        try:
            result = self._storage.at_once(settle, lock=lock)
        except optuna.exceptions.UpdateFinishedTrialError:
            result = result_of(self._storage.get_trial(trial_id)) or result
        del self._running[result.number]
        return result

    @_guarded
    def attended(self) -> set[int]:
        """Numbers of the trials that another living supervisor answers for: it tells the tracker of them itself.

        Whether those of another machine live is known only while a trial of theirs runs: a trial of theirs that has
        ended is theirs for ten minutes.
        """
        return self._roll.attended(self._trials())

    @property
    def spec(self) -> StudySpec:
        """The study as it is run: what was given, but for what it keeps of its beginning."""
        return self._spec

    @property
    def lease(self) -> Lease:
        """The proof of life of this handle."""
        return self._lease

    @_guarded
    def result(self) -> StudyResult:
        """Everything that the storage holds of this study."""
        return to_result(self._storage.get_study_user_attrs(self._id)[STUDY], self._storage.records(self._id))

    @_guarded
    def counted(self) -> int:
        """How many trials count against the budget: finished, running and waiting ones of the search."""
        return self._plan.tally(self._books()).total

    @property
    @_guarded
    def budget(self) -> int:
        """The total of trials that the study was last run for."""
        known = self._storage.get_study_user_attrs(self._id)[STUDY].get("budget")
        return int(known) if known is not None else total_trials(self._spec)

    @property
    def crowd(self) -> int:
        """How many supervisors had trials running when the storage was last read."""
        return len({start_of(trial).lease for trial in self._books().open.values()})

    @_guarded
    def claim_end(self) -> bool:
        """Whether all trials have ended, and no other supervisor has claimed to sum the study up as it stands now."""

        def claim() -> bool:
            trials = self._trials()
            ended = all(trial.state.is_finished() for trial in trials)
            claimed = self._storage.get_study_user_attrs(self._id).get(CLAIM) == len(trials)
            if ended and not claimed:
                self._storage.set_study_user_attr(self._id, CLAIM, len(trials))
            return ended and not claimed

        return self._storage.at_once(claim, lock=self._lock)

    @_guarded
    def stop_asked(self) -> bool:
        """Whether `hpo stop` has been called since this handle was opened; a stop of before is no concern of it."""
        return self._last_stop() != self._stop

    def _last_stop(self) -> str | None:
        stop: str | None = self._storage.get_study_user_attrs(self._id).get(STOP)
        return stop

    def close(self) -> None:
        """Free the lease and the connections; what still runs counts as dead from now on."""
        self._roll.close()
        self._lease.close()
        with contextlib.suppress(StoreError, OSError):
            clean_leases(self._home.locks)
        self._storage.close()

    @property
    def _lock(self) -> str:
        return f"{self.title}.ask"

    def _trials(self) -> list[FrozenTrial]:
        return self._storage.every_trial(self._id)

    def _books(self) -> Books:
        return self._storage.books(self._id)

    def _gone(self) -> list[FrozenTrial]:
        """Running trials of supervisors that are dead."""
        return self._roll.gone(self._books().open.values(), mine=self._running)

    def _next(self, budget: int, worker: str) -> tuple[Any, Start] | None:
        books = self._books()
        tally = self._plan.tally(books)
        self.exhausted = self.blocked = False
        if tally.running + tally.ended >= budget:
            # Final trainings follow once the last result is in.
            self.blocked = self._waits and tally.running > 0
            return None
        step = self._plan.current(books)
        if step is None:
            self.exhausted = True
            return None
        stage, proposer = step.stage, step.proposer
        mine = books.tally([stage.name])
        if not mine.waiting and step.full(mine):
            self.exhausted = step.last
            self.blocked = not step.last or self._waits or proposer.undrawn > 0
            return None
        trial = self._pop(stage.name, proposer) if mine.waiting else self._begin(step, books)
        known = trial.user_attrs.get(START)
        start = Start(**known) if known else Start(ordinal=books.first_tries(before=trial.number))
        parameters = stage.parameters(self._suggest(trial, stage, proposer))
        seed = parameters.get("training.seed", self._spec.training.seed)
        seed = self._spec.seed_of(start.ordinal) if seed is None else seed
        return self._sign(trial, replace(start, parameters=parameters, seed=seed), worker)

    def _begin(self, step: Step, books: Books) -> Any:
        """Start a new candidate of the stage; its first ones have the values to start with."""
        stage, place = step.stage, books.first_tries([step.stage.name])
        start = Start(ordinal=books.first_tries(), stage=stage.name, lease=self._lease.name)
        values = stage.first[place] if place < len(stage.first) else {}
        if not step.proposer.takes(values):
            values = {}
        fixed = {stage.label(path): encode(stage.space[path], value) for path, value in values.items()}
        self._storage.show(stage.name, brief=True)
        self._study.sampler = step.proposer
        return self._storage.begin_trial(self._study, template(optuna.trial.TrialState.RUNNING, start, fixed))

    def _pop(self, stage: str | None, sampler: Any) -> Any:
        """Start the stage's first waiting trial; there must be one."""
        self._storage.show(stage, brief=True)
        self._study.sampler = sampler
        return self._study.ask()

    def _suggest(self, trial: Any, stage: Stage, proposer: Proposer) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while parameters := proposer.active(values):
            path, parameter = parameters[0]
            values[path] = decode(parameter, trial._suggest(stage.label(path), distribution(parameter)))
        return values

    def _sign(self, trial: Any, start: Start, worker: str) -> tuple[Any, Start]:
        start = replace(start, worker=worker, lease=self._lease.name)
        trial.set_user_attr(START, start.to_json())
        return trial, start

    def _earlier(self, candidate: Candidate) -> TrialResult | None:
        """The result that answers the candidate, where the spec says to reuse one."""
        if self._spec.search.duplicates != "reuse":
            return None
        same = self._books().shelf(candidate.stage).same(key_of(candidate.parameters))
        complete = [trial for trial in same if state_of(trial) is TrialState.COMPLETE]
        return result_of(min(complete, key=lambda trial: trial.number)) if complete else None
