"""One study while it runs: hands out candidates, takes reports and results, and loses nothing when a process dies."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import optuna
from optuna.trial import FrozenTrial, Trial

from hpo.errors import StoreError
from hpo.home import Home
from hpo.records import FINAL, Candidate, FailureKind, StudyResult, TrialResult, TrialState
from hpo.search.enough import Verdict
from hpo.search.growth import seen_as
from hpo.search.pruners import build_pruner
from hpo.search.results import Finisher, template
from hpo.search.samplers import StageProgress, StageSampler, Step
from hpo.search.stages import Stage, encode, suggest, total_trials
from hpo.spec.automatic import prunes
from hpo.spec.study import StudySpec
from hpo.storage import outbox
from hpo.storage.liveness import Lease, Liveness, clean_leases
from hpo.storage.optuna_private import trial_id_of
from hpo.storage.optuna_storage import Storage
from hpo.storage.reader import to_result
from hpo.storage.retry import store_errors
from hpo.storage.stage_view import StageView
from hpo.storage.trial_attrs import CLAIM, START, STOP, STUDY, TrialAttrs, attrs_of, key_of, result_of, state_of
from hpo.storage.trial_index import TrialIndex

Method = TypeVar("Method", bound=Callable[..., Any])


def _guarded(method: Method) -> Method:
    """Turn faults of the storage into StoreError."""

    @functools.wraps(method)
    def guarded(self: Study, *args: Any, **options: Any) -> Any:
        with store_errors(self._home):
            return method(self, *args, **options)

    return cast("Method", guarded)


class Study:
    """The handle of one supervisor on one study, from open_study. All methods raise StoreError where the storage fails.

    title is the study's name in storage and tracking; notes are remarks on its start. exhausted: the last ask found no
    further candidate in the space. blocked: the last ask or ask_final had no candidate, but there may be one once
    running trials, perhaps of another supervisor, have ended. verdict: that of search.enough. shared: the storage is on
    a server.
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
        self._storage = storage
        self._lease = lease
        self._id: int = storage.database.get_study_id_from_name(title)
        if (record := self._attribute(STUDY)) and "grown" in record:
            storage.show(self._id, seen_as(spec, record))
        self._pruner = build_pruner(spec)
        self._prunes = prunes(spec)
        self._progress = StageProgress(spec, storage, self._id)
        self.verdict = Verdict(home, spec, storage, self._id, self._progress)
        self._running: dict[int, Trial] = {}
        self._reused: list[tuple[Candidate, TrialResult]] = []
        self._stop = self._last_stop()
        self.shared = storage.shared
        # On other machines trials end with their machine: a supervisor must remain to try them again.
        self._waits = self.shared or spec.final is not None
        self._liveness = Liveness(
            storage, self._id, lease, lambda: [trial_id_of(trial) for trial in list(self._running.values())]
        )
        self._finisher = Finisher(spec, storage, self._id, lease=lease.name)

    @_guarded
    def reap(self) -> list[int]:
        """Finish the running trials of dead supervisors and return their numbers; result() has their new states.

        A trial whose result was written, or kept on disk (see tell), ends with that result. Any other is stopped and
        retried, or failed once its process has died three times. Trials of living supervisors are never touched: for
        half a minute after this handle was opened, or the server was unavailable, none elsewhere counts as dead.
        """
        if not self._abandoned() and not outbox.pending(self._home, self.title):
            return []  # without the lock: many supervisors ask, and there is hardly ever any
        try:
            numbers, stored = self._storage.transact(self._reap, lock=self._lock)
        except optuna.exceptions.UpdateFinishedTrialError:
            return []  # another supervisor has just finished one: the next call finds the rest
        outbox.remove(self._home, self.title, stored)  # only now: a server may undo the transaction
        return numbers

    def listen(self) -> None:
        """Wait until reap knows of supervisors on other machines, too, whether they are dead."""
        self._liveness.listen()

    def _reap(self) -> tuple[list[int], set[int]]:
        """The numbers of the finished trials, and of those whose results on disk are stored now."""
        trials, abandoned = self._trials(), self._abandoned()
        pending = outbox.pending(self._home, self.title)
        for trial in abandoned:
            lost = TrialResult(
                trial.number, TrialState.STOPPED, reason="its process was gone", failure=FailureKind.INTERRUPTED
            )
            result = result_of(trial) or pending.get(trial.number) or lost
            self._finisher.finish(trial, result, died=trial.number not in pending)
        numbers = [trial.number for trial in abandoned]
        ended = {trial.number for trial in trials if trial.state.is_finished()}
        return numbers, pending.keys() & {*numbers, *ended}

    @_guarded
    def ask(self, *, budget: int, worker: str) -> Candidate | None:
        """The next candidate of the search, for a worker; None where there is none now.

        budget is the study's total number of trials: finished, running and waiting ones count; interrupted and retried
        ones and final trainings do not. Interrupted candidates come first. Candidates that reuse an earlier result are
        finished here: see take_reused. Raises SpecError where a stage has no trial to start from.
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
        """The candidates that ask has finished with an earlier result since the last call."""
        reused, self._reused = self._reused, []
        return reused

    @_guarded
    def enqueue_finals(self, candidates: Sequence[tuple[Mapping[str, Any], int]]) -> None:
        """Enqueue final trainings with these (parameters, seed), except those that were enqueued before."""
        self._storage.transact(partial(self._finisher.enqueue_finals, candidates), lock=self._lock)

    @_guarded
    def ask_final(self, *, worker: str) -> Candidate | None:
        """The next final training, interrupted ones included; None where none waits."""
        return self._hand_out(partial(self._next_final, worker))

    def _hand_out(self, step: Callable[[], tuple[Trial, TrialAttrs] | None]) -> Candidate | None:
        # Noted after the transaction: a server that undoes it has the whole step called again.
        handed = self._storage.transact_ask(self._id, step, lock=self._lock)
        if handed is None:
            return None
        trial, attrs = handed
        # Samplers saw a sample of a long stage; pruners see all of it.
        view = self._view(attrs.stage, sampled=False)
        trial.storage, trial.study = view, view.study(sampler=trial.study.sampler, pruner=self._pruner)
        self._running[trial.number] = trial
        return attrs.candidate(trial.number)

    def _next_final(self, worker: str) -> tuple[Trial, TrialAttrs] | None:
        counts = self._index().count([FINAL])
        self.blocked = not counts.waiting and counts.running > 0
        if not counts.waiting:
            return None
        trial = self._pop(FINAL, optuna.samplers.RandomSampler(seed=0))
        return self._sign(trial, TrialAttrs(**trial.user_attrs[START]), worker)

    @_guarded
    def add(self, stage: str, result: TrialResult) -> TrialResult:
        """Record a complete trial of a stage after the search that no worker trained; the result with its number."""
        return self._storage.transact(partial(self._finisher.add, stage, result), lock=self._lock)

    @_guarded
    def retry_failed(self) -> int:
        """Enqueue every failed candidate again, of search and final trainings; returns their number.

        A failed trial that is retried no longer counts against the budget: its retry does.
        """
        return self._storage.transact(self._finisher.retry_failed, lock=self._lock)

    @_guarded
    def report(self, number: int, epoch: int, value: float) -> bool:
        """Record the objective after an epoch (counted from 1; NaN and infinity allowed); True: prune the trial now.

        Final trainings are never pruned. With several objectives nothing is recorded: Optuna cannot store it.
        """
        if self._spec.search.objectives:
            return False
        trial = self._running[number]
        try:
            trial.report(value, epoch)
        except optuna.exceptions.UpdateFinishedTrialError:  # another supervisor has finished it, see tell
            return True
        stage = trial.user_attrs[START]["stage"]
        return stage != FINAL and self._prunes and bool(trial.should_prune())

    def tell(self, result: TrialResult, *, died: bool = False) -> TrialResult:
        """End a trial of this handle, and return the result as it was recorded.

        died: its worker did; a candidate whose process has died three times is failed. A complete trial without a
        finite value for each objective is recorded as failed. A trial that another supervisor has finished, because
        this one had no heartbeat for a minute, keeps the result of then. Where the storage refuses, the result is kept
        on disk for the next reap, and StoreError is raised.
        """
        try:
            return self._tell(result, died=died)
        except StoreError:
            self.leave(result)
            raise

    def leave(self, result: TrialResult) -> None:
        """Keep a result on disk: the first reap after this handle is closed stores it. Does not use the storage."""
        outbox.put(self._home, self.title, result)

    @_guarded
    def _tell(self, result: TrialResult, *, died: bool) -> TrialResult:
        trial_id = trial_id_of(self._running[result.number])
        database = self._storage.database
        lock = self._lock if result.state is TrialState.STOPPED else ""

        def finish() -> TrialResult:
            return self._finisher.finish(database.get_trial(trial_id), result, died=died)

        try:
            result = self._storage.transact(finish, lock=lock)
        except optuna.exceptions.UpdateFinishedTrialError:
            result = result_of(database.get_trial(trial_id)) or result
        del self._running[result.number]
        return result

    @_guarded
    def trials_of_others(self) -> set[int]:
        """The numbers of trials that another living supervisor is responsible for: it writes them to MLflow itself.

        A supervisor on another machine is known to live only while it has running trials: it is responsible for its
        ended trials for ten minutes.
        """
        return self._liveness.trials_of_others(self._trials())

    @property
    def spec(self) -> StudySpec:
        """The study as it is run: what was given, but for what it keeps of its beginning."""
        return self._spec

    @property
    def lease(self) -> Lease:
        """The lease of this handle."""
        return self._lease

    @_guarded
    def result(self) -> StudyResult:
        """The study with all its trials, as stored now."""
        return to_result(self._attribute(STUDY), self._storage.records(self._id))

    @_guarded
    def counted(self) -> int:
        """The number of trials that count against the budget: finished, running and waiting ones of the search."""
        return self._progress.count(self._index()).total

    @property
    @_guarded
    def budget(self) -> int:
        """The total number of trials that the study was last run for."""
        budget = self._attribute(STUDY).get("budget")
        return int(budget) if budget is not None else total_trials(self._spec)

    @property
    def crowd(self) -> int:
        """The number of supervisors with running trials, as last read from the storage."""
        return len({attrs_of(trial).lease for trial in self._index().open.values()})

    @_guarded
    def claim_end(self) -> bool:
        """Claim to summarise the study; True if all trials have ended and no other supervisor has claimed it."""

        def claim() -> bool:
            trials = self._trials()
            ended = all(trial.state.is_finished() for trial in trials)
            claimed = self._attribute(CLAIM) == len(trials)
            if ended and not claimed:
                self._storage.database.set_study_user_attr(self._id, CLAIM, len(trials))
            return ended and not claimed

        return self._storage.transact(claim, lock=self._lock)

    @_guarded
    def stop_asked(self) -> bool:
        """Whether `hpo stop` has been called since this handle was opened; earlier calls do not count."""
        return self._last_stop() != self._stop

    def _last_stop(self) -> str | None:
        stop: str | None = self._attribute(STOP)
        return stop

    def _attribute(self, key: str) -> Any:
        return self._storage.database.get_study_user_attrs(self._id).get(key)

    def close(self) -> None:
        """Release the lease and the connections; trials that still run count as abandoned from now on."""
        self._liveness.close()
        self._lease.close()
        with contextlib.suppress(StoreError, OSError):
            clean_leases(self._home.locks)
        self._storage.close()

    @property
    def _lock(self) -> str:
        return f"{self.title}.ask"

    def _trials(self) -> list[FrozenTrial]:
        return self._storage.every_trial(self._id)

    def _index(self) -> TrialIndex:
        return self._storage.index(self._id)

    def _view(self, stage: str | None, *, sampled: bool) -> StageView:
        return StageView(self._storage, self.title, self._id, stage, sampled=sampled)

    def _abandoned(self) -> list[FrozenTrial]:
        """The running trials of supervisors that are dead."""
        return self._liveness.abandoned(self._index().open.values(), mine=self._running)

    def _next(self, budget: int, worker: str) -> tuple[Trial, TrialAttrs] | None:
        index = self._index()
        counts = self._progress.count(index)
        self.exhausted = self.blocked = False
        if counts.running + counts.ended >= budget:
            # Final trainings follow once the last result is in.
            self.blocked = self._waits and counts.running > 0
            return None
        step = self._progress.current(index)
        if step is None:
            self.exhausted = True
            return None
        stage, sampler = step.stage, step.sampler
        own = index.count([stage.name])
        if not own.waiting and step.is_full(own):
            self.exhausted = step.last
            self.blocked = not step.last or self._waits or sampler.undrawn > 0
            return None
        trial = self._pop(stage.name, sampler) if own.waiting else self._begin(step, index)
        stored = trial.user_attrs.get(START)
        attrs = TrialAttrs(**stored) if stored else TrialAttrs(ordinal=index.first_tries(before=trial.number))
        parameters = stage.parameters(self._suggest(trial, stage, sampler))
        seed = parameters.get("training.seed", self._spec.training.seed)
        seed = self._spec.seed_of(attrs.ordinal) if seed is None else seed
        return self._sign(trial, replace(attrs, parameters=parameters, seed=seed), worker)

    def _begin(self, step: Step, index: TrialIndex) -> Trial:
        """Start a new candidate of the stage; the first ones have the values of Stage.first."""
        stage, position = step.stage, index.first_tries([step.stage.name])
        attrs = TrialAttrs(ordinal=index.first_tries(), stage=stage.name, lease=self._lease.name)
        values = stage.first[position] if position < len(stage.first) else {}
        if not step.sampler.accepts(values):
            values = {}
        fixed = {stage.label(path): encode(stage.space[path], value) for path, value in values.items()}
        view = self._view(stage.name, sampled=True)
        study = view.study(sampler=step.sampler, pruner=self._pruner)
        return view.begin_trial(study, template(optuna.trial.TrialState.RUNNING, attrs, fixed))

    def _pop(self, stage: str | None, sampler: Any) -> Trial:
        """Start the stage's first waiting trial; there must be one."""
        return self._view(stage, sampled=True).study(sampler=sampler, pruner=self._pruner).ask()

    def _suggest(self, trial: Trial, stage: Stage, sampler: StageSampler) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while parameters := sampler.active(values):
            path, parameter = parameters[0]
            values[path] = suggest(trial, stage.label(path), parameter)
        return values

    def _sign(self, trial: Trial, attrs: TrialAttrs, worker: str) -> tuple[Trial, TrialAttrs]:
        attrs = replace(attrs, worker=worker, lease=self._lease.name)
        trial.set_user_attr(START, attrs.to_json())
        return trial, attrs

    def _earlier(self, candidate: Candidate) -> TrialResult | None:
        """The result of an earlier trial that the candidate reuses, if the spec says so."""
        if self._spec.search.duplicates != "reuse":
            return None
        same = self._index().ended(candidate.stage).with_key(key_of(candidate.parameters))
        complete = [trial for trial in same if state_of(trial) is TrialState.COMPLETE]
        return result_of(min(complete, key=lambda trial: trial.number)) if complete else None
