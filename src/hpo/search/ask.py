"""One study while it runs: candidates out, reports and results in, nothing lost between two processes."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

import optuna
from optuna.distributions import check_distribution_compatibility
from optuna.trial import FrozenTrial

from hpo.errors import SpecError
from hpo.home import Home
from hpo.records import Candidate, StudyResult, TrialResult, TrialState
from hpo.search.lease import Lease, clean_leases, locked
from hpo.search.storage import (
    RESULT,
    START,
    STUDY,
    Start,
    Storage,
    generations,
    is_sqlite,
    open_storage,
    result_of,
    start_of,
    state_of,
    store_errors,
    to_candidate,
    to_result,
)
from hpo.search.strategy import Proposer, build_pruner, decode, distribution, encode
from hpo.spec.study import StudySpec

_MOST_DEATHS = 3
_OPTUNA_STATES = {
    TrialState.COMPLETE: optuna.trial.TrialState.COMPLETE,
    TrialState.PRUNED: optuna.trial.TrialState.PRUNED,
    TrialState.FAILED: optuna.trial.TrialState.FAIL,
    TrialState.STOPPED: optuna.trial.TrialState.FAIL,
}

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

    title is the study's name in storage and tracking. exhausted turns True when the space has nothing left to hand out.
    All methods raise StoreError where the storage refuses.
    """

    def __init__(self, home: Home, spec: StudySpec, storage: Storage, title: str, lease: Lease) -> None:
        self.title = title
        self.exhausted = False
        self._home = home
        self._spec = spec
        self._storage = storage
        self._lease = lease
        self._id: int = storage.get_study_id_from_name(title)
        self._proposer = Proposer(spec, self._trials)
        self._study = optuna.load_study(
            study_name=title, storage=storage, sampler=self._proposer, pruner=build_pruner(spec)
        )
        self._running: dict[int, Any] = {}

    @_guarded
    def reap(self) -> list[int]:
        """Settle running trials whose supervisor is gone, and return their numbers; result() says how each stands.

        A trial whose result had been written is told as that result. Any other is stopped and a retry of it enqueued,
        or failed once its process has died three times. A trial of a living supervisor is never touched.
        """
        with self._locked():
            gone = [trial for trial in self._trials() if self._abandoned(trial)]
            for trial in gone:
                lost = TrialResult(trial.number, TrialState.STOPPED, reason="its process was gone")
                self._settle(trial, result_of(trial) or lost, died=True)
        return [trial.number for trial in gone]

    @_guarded
    def ask(self, *, budget: int, worker: str) -> Candidate | None:
        """The next candidate, in the name of a worker; None where there is nothing to hand out now.

        budget is the study's total of trials: finished ones count, running and waiting ones too, interrupted ones do
        not. Interrupted candidates come first. A grid without free cells sets `exhausted`.
        """
        with self._locked():
            trials = self._trials()
            states = [state_of(trial) for trial in trials]
            waiting = states.count(TrialState.WAITING)
            if len(trials) - waiting - states.count(TrialState.STOPPED) >= budget:
                return None
            if not waiting:
                if self._proposer.exhausted:
                    self.exhausted = True
                    return None
                first_tries = sum(start_of(trial).retry_of is None for trial in trials)
                self._enqueue(Start(ordinal=first_tries, lease=self._lease.name))
            trial = self._study.ask()
            known = trial.user_attrs.get(START)
            start = Start(**known) if known else Start(ordinal=trial.number)
            values = self._suggest(trial)
            seed = values.get("training.seed", self._spec.training.seed)
            start = replace(
                start,
                parameters=values,
                seed=self._spec.seed_of(start.ordinal) if seed is None else seed,
                worker=worker,
                lease=self._lease.name,
            )
            trial.set_user_attr(START, start.to_json())
            self._running[trial.number] = trial
        return to_candidate(trial.number, start)

    @_guarded
    def report(self, number: int, epoch: int, value: float) -> bool:
        """Record the objective after an epoch (counted from 1; NaN and infinity allowed); True: prune the trial now."""
        trial = self._running[number]
        trial.report(value, epoch)
        return self._spec.search.pruner.name != "none" and bool(trial.should_prune())

    @_guarded
    def tell(self, result: TrialResult) -> None:
        """Close a trial of this handle. STOPPED enqueues its candidate again, ahead of new ones.

        A complete trial without a finite value is recorded as failed.
        """
        if result.state is TrialState.COMPLETE and not math.isfinite(
            math.nan if result.value is None else result.value
        ):
            reason = f"the objective is {result.value}, not a finite number"
            result = replace(result, state=TrialState.FAILED, value=None, reason=reason)
        trial = self._storage.get_trial(self._running[result.number]._trial_id)
        if result.state is TrialState.STOPPED:
            with self._locked():
                self._settle(trial, result)
        else:
            self._settle(trial, result)
        del self._running[result.number]

    @_guarded
    def result(self) -> StudyResult:
        """Everything that the storage holds of this study."""
        return to_result(self._storage.get_study_user_attrs(self._id)[STUDY], self._trials())

    @_guarded
    def counted(self) -> int:
        """How many trials count against the budget: finished, running and waiting ones."""
        return sum(state_of(trial) is not TrialState.STOPPED for trial in self._trials())

    def close(self) -> None:
        """Free the lease and the connections; what still runs counts as dead from now on."""
        self._lease.close()
        self._storage.close()

    def _locked(self) -> Any:
        return locked(self._home.locks / f"{self.title}.ask.lock")

    def _trials(self) -> list[FrozenTrial]:
        return self._storage.every_trial(self._id)

    def _abandoned(self, trial: FrozenTrial) -> bool:
        if trial.state is not optuna.trial.TrialState.RUNNING or START not in trial.user_attrs:
            return False
        lease = start_of(trial).lease
        # One under our own name that we do not know of: its process died between taking it up and signing for it.
        return trial.number not in self._running if lease == self._lease.name else not self._lease.alive(lease)

    def _suggest(self, trial: Any) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while parameters := self._proposer.active(values):
            path, parameter = parameters[0]
            values[path] = decode(parameter, trial._suggest(path, distribution(parameter)))
        return values

    def _settle(self, trial: FrozenTrial, result: TrialResult, *, died: bool = False) -> None:
        """Record, enqueue, close, in this order: killed between two of them, reap can do the rest."""
        start = start_of(trial)
        deaths = start.deaths + died
        if result.state is TrialState.STOPPED and deaths >= _MOST_DEATHS:
            reason = f"interrupted {deaths} times: its process died each time"
            result = replace(result, state=TrialState.FAILED, reason=reason)
        self._storage.set_trial_user_attr(trial._trial_id, RESULT, result.to_json())
        if result.state is TrialState.STOPPED and not self._retried(trial.number):
            retry = replace(start, attempt=start.attempt + 1, deaths=deaths, retry_of=trial.number, worker="")
            # What samplers noted about the candidate stays true; the rungs it reached do not.
            notes = {key: note for key, note in trial.system_attrs.items() if not key.startswith("completed_rung_")}
            self._enqueue(replace(retry, lease=self._lease.name), notes)
        value = result.value if result.state is TrialState.COMPLETE else None
        self._study.tell(trial.number, value, _OPTUNA_STATES[result.state])

    def _retried(self, number: int) -> bool:
        return any(start_of(trial).retry_of == number for trial in self._trials())

    def _enqueue(self, start: Start, notes: Mapping[str, Any] | None = None) -> None:
        space = self._spec.search.space
        fixed = {path: encode(space[path], value) for path, value in (start.parameters or {}).items() if path in space}
        self._study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.WAITING,
                user_attrs={START: start.to_json()},
                system_attrs={**(notes or {}), "fixed_params": fixed},
            )
        )


def open_study(home: Home, spec: StudySpec, *, data_digest: str, fresh: bool = False) -> Study:
    """Start a study, or go on with its newest generation; fresh starts a new generation.

    data_digest is that of the images the trials will see. Raises SpecError where the spec or the data differ from what
    the study's trials were run with (space, sampler, pruner and budget may change, options of a choice may not), and
    StoreError where the storage refuses.
    """
    # What Optuna has to say about its experimental parts is not for our users. Filtered once: catch_warnings around
    # every call is not safe while the tracker's thread uses it too.
    warnings.filterwarnings("ignore", module="optuna")
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    storage = open_storage(home)
    try:
        with store_errors(home), locked(home.locks / "studies.lock"):
            title = _enter(storage, spec, data_digest, fresh)
            clean_leases(home.locks)
            return Study(home, spec, storage, title, Lease(home.locks, shared=not is_sqlite(home)))
    except BaseException:
        storage.close()
        raise


def _enter(storage: Storage, spec: StudySpec, data_digest: str, fresh: bool) -> str:
    """Write the study's record, old or new, and return its title."""
    known = generations(storage, spec.name)
    generation = max(known, default=0) + (fresh or not known)
    title = spec.name if generation == 1 else f"{spec.name}~{generation}"
    record = {
        "name": spec.name,
        "generation": generation,
        "direction": spec.search.better,
        "objective": spec.search.objective,
        "spec": spec.model_dump(mode="json"),
        "identity": spec.identity(),
        "data_digest": data_digest,
        "created": time.time(),
    }
    if generation in known:
        number, before = storage.studies()[title]
        _check_same(before, record)
        _check_space(spec, storage.every_trial(number))
        record["created"] = before["created"]
    else:
        # It may exist without our record: its maker was killed between the two writes.
        study = optuna.create_study(
            storage=storage, study_name=title, direction=spec.search.better, load_if_exists=True
        )
        number = study._study_id
    storage.set_study_user_attr(number, STUDY, record)
    return title


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    old = dict(_flat({**before["identity"], "data digest": before["data_digest"]}))
    new = dict(_flat({**now["identity"], "data digest": now["data_digest"]}))
    absent = object()
    places = [place for place in {**old, **new} if old.get(place, absent) != new.get(place, absent)]
    if places:
        changes = ", ".join(f"{place}: {old.get(place, 'absent')} -> {new.get(place, 'absent')}" for place in places)
        raise SpecError(
            f"{now['name']}: its trials were run otherwise, and would not be comparable: {changes}.",
            "Run it as it was, or start it anew with --fresh.",
        )


def _flat(tree: Mapping[str, Any], stem: str = "") -> Any:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{stem}{key}.")
        else:
            yield f"{stem}{key}", value


def _check_space(spec: StudySpec, trials: list[FrozenTrial]) -> None:
    """Optuna cannot go on where a parameter has changed its kind or a choice its options."""
    tried: dict[str, Any] = {path: found for trial in trials for path, found in trial.distributions.items()}
    for path, parameter in spec.search.space.items():
        try:
            check_distribution_compatibility(tried.get(path, distribution(parameter)), distribution(parameter))
        except ValueError:
            raise SpecError(
                f"{spec.name}: search.space.{path}: was {tried[path]}, is now {distribution(parameter)}.",
                "Ends of a range may move while a study goes on, options and kind may not: start it anew with --fresh.",
            ) from None
