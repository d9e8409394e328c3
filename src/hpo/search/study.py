"""One study while it runs: hands out candidates, takes reports and results, and loses nothing when a process dies."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial

from hpo.errors import StoreError
from hpo.home import Home
from hpo.locks import ask_lock
from hpo.records import FINAL, Candidate, FailureKind, StudyResult, TrialResult, TrialState
from hpo.search.enough import Verdict
from hpo.search.growth import seen_as, times_grown
from hpo.search.halving import ParetoHalving
from hpo.search.results import Finisher, reused
from hpo.search.stages import total_trials
from hpo.search.starter import Starter
from hpo.spec.automatic import prunes
from hpo.spec.study import StudySpec
from hpo.storage import outbox
from hpo.storage.liveness import Lease, Liveness, clean_leases
from hpo.storage.optuna_private import trial_id_of
from hpo.storage.optuna_storage import Storage
from hpo.storage.reader import to_result
from hpo.storage.retry import guarded
from hpo.storage.trial_attrs import ASKED, CLAIM, START, STOP, STUDY, TrialAttrs, attrs_of, pauses_of, result_of
from hpo.storage.trial_index import TrialIndex


class Study:
    """The handle of one supervisor on one study, from open_study. All methods raise StoreError where the storage fails.

    title is the study's name in storage and tracking; notes are remarks on its start. verdict: that of search.enough.
    shared: the storage is on a server.
    """

    def __init__(
        self, home: Home, spec: StudySpec, storage: Storage, title: str, lease: Lease, notes: Sequence[str] = ()
    ) -> None:
        self.title = title
        self.notes = list(notes)
        self._home = home
        self._spec = spec
        self._storage = storage
        self._lease = lease
        self._id: int = storage.database.get_study_id_from_name(title)
        record = self._attribute(STUDY) or {}
        if grown := times_grown(record):
            storage.show(self._id, seen_as(spec, record))
        self._prunes = prunes(spec)
        self._pareto = ParetoHalving(spec)
        self._running: dict[int, Trial] = {}
        storage.pauses = spec.search.thaw is not None
        self._reused: list[tuple[Candidate, TrialResult]] = []
        self._stop = self._last_stop()
        self.shared = storage.shared
        # On other machines trials end with their machine: a supervisor must remain to try them again.
        waits = self.shared or spec.final is not None
        self._starter = Starter(spec, storage, self._id, title=title, lease=lease.name, waits=waits, grown=grown)
        self.verdict = Verdict(home, spec, storage, self._id, self._starter)
        self._liveness = Liveness(
            storage, self._id, lease, lambda: [trial_id_of(trial) for trial in list(self._running.values())]
        )
        self._finisher = Finisher(spec, storage, self._id, lease=lease.name)

    @guarded
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

    @guarded
    def ask(
        self, *, budget: int, worker: str, resumable: Callable[[Candidate], bool] = lambda _: False
    ) -> Candidate | None:
        """The next candidate of the search, for a worker; None where there is none now.

        budget is the study's total number of trials: finished, running, waiting and paused ones count; interrupted and
        retried ones and final trainings do not. Interrupted candidates come first, then, with search.thaw, the paused
        ones that are promoted, if they are resumable: the caller has their checkpoint. Candidates that reuse an earlier
        result are finished here: see take_reused. Raises SpecError where a stage has no trial to start from.
        """
        while True:
            candidate = self._hand_out(partial(self._starter.next, budget, worker, resumable))
            earlier = self._starter.earlier(candidate) if candidate else None
            if candidate is None or earlier is None:
                return candidate
            result = reused(earlier, candidate.number)
            self.tell(result)
            self._reused.append((candidate, result))

    def take_reused(self) -> list[tuple[Candidate, TrialResult]]:
        """The candidates that ask has finished with an earlier result since the last call."""
        reused, self._reused = self._reused, []
        return reused

    def before_pause(self, number: int) -> TrialResult | None:
        """The result that a running trial had when it was paused; None where it was not."""
        return self._starter.continued.get(number)

    def held(self) -> list[int]:
        """The numbers of the running trials of this handle."""
        return sorted(self._running)

    @guarded
    def take_over(self, number: int) -> None:
        """Take a trial that was handed over. Raises StoreError where there is none of that number."""
        take = partial(self._starter.take_over, self.title, number)
        self._running[number] = self._storage.transact(take, lock=self._lock)

    @guarded
    def hand_over(self, number: int) -> None:
        """Leave a trial to a program of the user's own, which may end: nobody reaps it, and take_over continues it."""
        trial = self._running.pop(number)
        trial.set_user_attr(START, {**trial.user_attrs[START], "lease": ASKED})

    @guarded
    def reported(self, number: int) -> dict[int, float]:
        """Epoch -> the objective, of a running trial of this handle."""
        return dict(self._storage.database.get_trial(trial_id_of(self._running[number])).intermediate_values)

    @guarded
    def worst_paused(self) -> list[Candidate]:
        """The paused trials, those that are least likely to be promoted first."""
        index = self._index()
        return [attrs_of(trial).candidate(trial.number) for trial in self._starter.paused.worst_first(index)]

    @guarded
    def end_paused(self, numbers: Collection[int]) -> list[TrialResult]:
        """End these paused trials as pruned."""
        return self._storage.transact(partial(self._end_paused, numbers), lock=self._lock)

    def _end_paused(self, numbers: Collection[int]) -> list[TrialResult]:
        chosen = [trial for number, trial in sorted(self._index().paused.items()) if number in numbers]
        return [self._finisher.end_paused(trial) for trial in chosen]

    @guarded
    def end_search(self) -> list[TrialResult]:
        """This supervisor continues no paused trial any more: end those that no other one can, as pruned.

        None ends while a trial of the search runs; who runs it ends them. Takes half a minute where the server has
        paused trials of other machines and this handle has just been opened.
        """

        def end() -> list[TrialResult]:
            self._lease.end_search()
            index = self._index()
            if self._starter.progress.count(index).running:
                return []
            return self._end_paused(self._liveness.given_up(index.paused.values()))

        if self._liveness.has_far(self._index().paused.values()):
            self.listen()
        return self._storage.transact(end, lock=self._lock)

    @guarded
    def enqueue_finals(self, candidates: Sequence[tuple[Mapping[str, Any], int]]) -> None:
        """Enqueue final trainings with these (parameters, seed), except those that were enqueued before.

        Raises StoreError where another supervisor has changed the space: they are the best of the one before.
        """

        def enqueue() -> None:
            self._starter.check_space()
            self._finisher.enqueue_finals(candidates)

        self._storage.transact(enqueue, lock=self._lock)

    @guarded
    def ask_final(self, *, worker: str) -> Candidate | None:
        """The next final training, interrupted ones included; None where none waits."""
        return self._hand_out(partial(self._starter.next_final, worker))

    def _hand_out(self, step: Callable[[], tuple[Trial, TrialAttrs] | None]) -> Candidate | None:
        # Noted after the transaction: a server that undoes it has the whole step called again.
        handed = self._storage.transact_ask(self._id, step, lock=self._lock)
        if handed is None:
            return None
        trial, attrs = handed
        # Samplers saw a sample of a long stage; pruners see all of it.
        view = self._starter.view(attrs.stage, sampled=False)
        trial.storage, trial.study = view, view.study(sampler=trial.study.sampler, pruner=self._starter.pruner)
        self._running[trial.number] = trial
        return attrs.candidate(trial.number)

    @guarded
    def add(self, stage: str, result: TrialResult, *, final: Mapping[str, Any]) -> TrialResult:
        """Record a complete trial of no worker, judged as `final` (see FinalSpec) says; the result with its number."""
        return self._storage.transact(partial(self._finisher.add, stage, result, final), lock=self._lock)

    @guarded
    def retry_failed(self) -> int:
        """Enqueue every failed candidate again, of search and final trainings; returns their number.

        A failed trial that is retried no longer counts against the budget: its retry does.
        """
        return self._storage.transact(self._finisher.retry_failed, lock=self._lock)

    @guarded
    def report(self, number: int, epoch: int, value: float | Sequence[float]) -> bool:
        """Record the objective after an epoch (counted from 1; NaN and infinity allowed); True: prune the trial now.

        Final trainings are never pruned. With several objectives value has one for each, and only those at the rungs of
        successive halving are recorded: Optuna has no place for them.
        """
        trial = self._running[number]
        prunes = self._prunes and trial.user_attrs[START]["stage"] != FINAL
        try:
            if self._spec.search.objectives:
                if not prunes or not isinstance(value, Sequence):
                    return False
                return self._pareto.prune(trial.storage, self._id, trial_id_of(trial), epoch, value)
            trial.report(value, epoch)
            return prunes and bool(trial.should_prune())
        except optuna.exceptions.UpdateFinishedTrialError:  # another supervisor has finished it, see tell
            return True

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

    @guarded
    def _tell(self, result: TrialResult, *, died: bool) -> TrialResult:
        trial_id = trial_id_of(self._running[result.number])
        database = self._storage.database
        lock = self._lock if result.state in (TrialState.STOPPED, TrialState.PAUSED) else ""

        def finish() -> TrialResult:
            trial = database.get_trial(trial_id)
            if attrs_of(trial).lease != self._lease.name or pauses_of(trial):
                # Paused already, by a call of which the server's answer was lost, and perhaps continued elsewhere.
                return result_of(trial) or result
            return self._finisher.finish(trial, result, died=died)

        try:
            result = self._storage.transact(finish, lock=lock)
        except optuna.exceptions.UpdateFinishedTrialError:
            result = result_of(database.get_trial(trial_id)) or result
        del self._running[result.number]
        self._starter.continued.pop(result.number, None)
        return result

    @guarded
    def trials_of_others(self) -> set[int]:
        """The numbers of trials that another living supervisor is responsible for: it writes them to MLflow itself.

        A supervisor on another machine is known to live only while it has running trials: it is responsible for its
        ended trials for ten minutes.
        """
        return self._liveness.trials_of_others(self._trials())

    @property
    def exhausted(self) -> bool:
        """Whether the last ask found no further candidate in the space."""
        return self._starter.exhausted

    @property
    def blocked(self) -> bool:
        """Whether the last ask or ask_final had no candidate, but there may be one once running trials have ended.

        These may be trials of another supervisor.
        """
        return self._starter.blocked

    @property
    def spec(self) -> StudySpec:
        """The study as it is run: what was given, but for what it keeps of its beginning."""
        return self._spec

    @property
    def lease(self) -> Lease:
        """The lease of this handle."""
        return self._lease

    @guarded
    def result(self) -> StudyResult:
        """The study with all its trials, as stored now."""
        return to_result(self._attribute(STUDY), self._storage.records(self._id))

    @guarded
    def counted(self) -> int:
        """The number of trials that count against the budget: finished, running and waiting ones of the search."""
        return self._starter.progress.count(self._index()).total

    @property
    @guarded
    def budget(self) -> int:
        """The total number of trials that the study was last run for."""
        budget = self._attribute(STUDY).get("budget")
        return int(budget) if budget is not None else total_trials(self._spec)

    @property
    def crowd(self) -> int:
        """The number of supervisors with running trials, as last read from the storage."""
        return len({attrs_of(trial).lease for trial in self._index().open.values()})

    @guarded
    def claim_end(self, *, early: bool = False) -> bool:
        """Claim to summarise the study; True if all trials have ended and no other supervisor has claimed it.

        early: the search has ended before its budget was spent, and trials that wait will not be trained.
        """

        def claim() -> bool:
            trials = self._trials()
            waits = optuna.trial.TrialState.WAITING
            ended = all(trial.state.is_finished() or (early and trial.state == waits) for trial in trials)
            claimed = self._attribute(CLAIM) == len(trials)
            if ended and not claimed:
                self._storage.database.set_study_user_attr(self._id, CLAIM, len(trials))
            return ended and not claimed

        return self._storage.transact(claim, lock=self._lock)

    @guarded
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
        return ask_lock(self.title)

    def _trials(self) -> list[FrozenTrial]:
        return self._storage.every_trial(self._id)

    def _index(self) -> TrialIndex:
        return self._storage.index(self._id)

    def _abandoned(self) -> list[FrozenTrial]:
        """The running trials of supervisors that are dead."""
        return self._liveness.abandoned(self._index().open.values(), mine=self._running)
