"""Candidates of a study for a program that trains them itself: ask, report, tell."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpo.errors import SpecError, StoreError
from hpo.home import Home
from hpo.records import Candidate, Epoch, FailureKind, TrialResult, TrialState
from hpo.spec.load import load_study
from hpo.spec.study import StudySpec
from hpo.storage.reader import find_study, read_snapshots

Outcome = Literal["complete", "pruned", "failed", "stopped"]


@dataclass(frozen=True)
class Asked:
    """A candidate: the number of its trial, the values of the search space by their paths, and its seed.

    settings are all settings of data, split, model and training by their dotted paths, these values filled in.
    """

    number: int
    parameters: Mapping[str, Any]
    seed: int
    stage: str | None
    settings: Mapping[str, Any]


class AskTell:
    """The candidates of one study, from ask_tell. Use it as a context, or close it.

    Trials that were asked for and not told when it closes, or when its process dies, are tried again by whoever asks
    next; hand_over leaves them to another process. All methods raise StoreError where the storage fails.
    """

    def __init__(self, home: Home, study: Any, cleanup: contextlib.ExitStack, trials: int | None) -> None:
        self._home, self._study, self._cleanup = home, study, cleanup
        self._trials = trials
        self._told = False
        self._kept: set[int] = set()  # trials whose result is on disk, since the storage refused it
        self._taken: set[int] = set()  # trials of hpo ask, which go back to their program

    def __enter__(self) -> AskTell:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def title(self) -> str:
        """The study's name, and ~2, ~3 of a later generation."""
        return str(self._study.title)

    @property
    def exact(self) -> str:
        """The name of this generation, which no later one takes over."""
        return str(self._study.result().exact)

    def ask(self) -> Asked | None:
        """The next candidate; None where the budget is spent, the space is, or running trials must end first.

        One whose values do not fit together is recorded as pruned and infeasible, as in a run; the next one follows.
        """
        from hpo.search.results import misfit

        while (candidate := self._next()) is not None:
            try:
                settings = self._study.spec.with_values(candidate.parameters).flat()
            except SpecError as error:
                self._end(misfit(candidate.number, error))
                continue
            return Asked(candidate.number, candidate.parameters, candidate.seed, candidate.stage, settings)
        return None

    def _next(self) -> Candidate | None:
        budget = self._study.budget if self._trials is None else self._trials
        self._study.reap()
        candidate: Candidate | None = self._study.ask(budget=budget, worker="a program")
        if candidate is None and self._study.shared:
            self._study.listen()  # only now is a process on another machine known to be dead
            candidate = self._study.ask(budget=budget, worker="a program") if self._study.reap() else None
        return candidate

    def report(self, number: int, epoch: int, value: float | Sequence[float]) -> bool:
        """Record the objective after an epoch, counted from 1; True: the pruner ends the trial, tell it as pruned.

        With several objectives value has one for each, in the order of the study. Raises SpecError otherwise.
        """
        values, wanted = len(value) if isinstance(value, Sequence) else 0, len(self._study.spec.search.objectives)
        if values != wanted:
            one = f"one value for each of the {wanted} objectives" if wanted else "one number"
            raise SpecError(f"{self.title}#{number}: {value} was reported.", f"Report {one}.")
        self._held(number)
        return bool(self._study.report(number, epoch, value))

    def tell(
        self,
        number: int,
        value: float | None = None,
        *,
        scores: Mapping[str, float] | None = None,
        state: Outcome = "complete",
        reason: str = "",
    ) -> TrialResult:
        """End a trial, and return the result as it was recorded.

        value is the objective; without one it is the best that was reported. scores are further ones by their names in
        the study file, such as parameters: those of all objectives, and of constraints. state stopped: it is tried
        again. reason says why it failed.
        """
        self._held(number)
        spec = self._study.spec
        reported = {step: each for step, each in self._study.reported(number).items() if math.isfinite(each)}
        objective, better = spec.search.objective, max if spec.search.better == "maximize" else min
        best = better(reported, key=lambda step: reported[step]) if reported else 0
        value = reported.get(best) if value is None and not spec.search.objectives else value
        result = TrialResult(
            number,
            TrialState(state),
            value=value,
            best_epoch=best,
            epochs=tuple(Epoch(step, {objective: each}, 0.0, 0.0) for step, each in sorted(reported.items())),
            scores={**({objective: value} if value is not None else {}), **(scores or {})},
            reason=reason,
            failure=FailureKind.EXCEPTION if state == "failed" else None,
            ended=time.time(),
        )
        return self._end(result)

    def _end(self, result: TrialResult) -> TrialResult:
        """Tell a result; close records it in MLflow. Where the storage refuses, it is kept on disk."""
        try:
            recorded: TrialResult = self._study.tell(result)
        except StoreError:
            self._kept.add(result.number)
            raise
        self._kept.discard(result.number)
        self._told = True
        return recorded

    def hand_over(self, number: int) -> None:
        """Leave a running trial to another process, which reports and tells it; until then nobody tries it again."""
        self._held(number)
        self._study.hand_over(number)

    def close(self) -> None:
        """Bring MLflow up to date, give back the trials that were not told, and close the study."""
        try:
            if self._told:
                self._record()
            for number in self._study.held():
                if number in self._taken - self._kept:
                    self._study.hand_over(number)
                elif number not in self._kept:
                    lost = TrialResult(number, TrialState.STOPPED, reason="it was not told", ended=time.time())
                    self._study.tell(lost)
        finally:
            self._cleanup.close()

    def _held(self, number: int) -> None:
        """Take over a trial of another process, unless it is held here. Raises StoreError where there is none."""
        if number not in self._study.held():
            self._study.take_over(number)
            self._taken.add(number)

    def _record(self) -> None:
        """A store that is unavailable costs nothing: the next close, or hpo run, writes what is missing."""
        from hpo.report.summary import study_summary
        from hpo.tracking.tracker import Tracker

        study, tracker = self._study.result(), Tracker(self._home)
        budget = self._study.budget if self._trials is None else self._trials
        try:
            tracker.reconcile(study, self._study.spec, leave=self._study.trials_of_others())
            if len(study.counted) >= budget and all(trial.state.finished for trial in study.counted):
                tracker.close_study(study, status="FINISHED", summary=study_summary(study, winner=None))
        except StoreError as error:
            logging.getLogger("hpo").warning("%s is not in MLflow yet: %s", study.title, error.message)


def ask_tell(
    study: StudySpec | Mapping[str, Any] | str | Path,
    *,
    trials: int | None = None,
    home: str | Path | None = None,
    trust: bool = False,
) -> AskTell:
    """Open a study for a program that trains its candidates itself, with the sampler, pruner and priors of the study.

    study is a spec, the content of a study file, the path of one, or a name. A study of that name that has begun is
    continued as it is; else its data are prepared, since they are part of what a study is. trials is its total number
    of trials. Raises HpoError for whatever the user can fix.
    """
    place = Home.find(home).create()
    cleanup = contextlib.ExitStack()
    try:
        begun = _begun(place, study) if isinstance(study, str) else None
        if begun is not None:
            from hpo.search.lifecycle import opened

            handle = cleanup.enter_context(opened(place, begun))
        else:
            spec = study if isinstance(study, StudySpec) else load_study(study, trust=trust)
            _check(spec)
            handle = _open(place, spec, trials, trust=trust)
            cleanup.callback(handle.close)
        _check(handle.spec)
        handle.reap()
    except BaseException:
        cleanup.close()
        raise
    return AskTell(place, handle, cleanup, trials)


def _check(spec: StudySpec) -> None:
    if spec.search.thaw is not None:
        raise SpecError(f"{spec.name}: search.thaw needs checkpoints of hpo.", "Write thaw: false.")


def _begun(home: Home, name: str) -> str | None:
    """The title of the newest generation of a study, or of the one of exactly this title; None where none has begun."""
    found = [one.study for one in read_snapshots(home, results=False)]
    found = [one for one in found if name in (one.name, one.exact, one.title)]
    return max(found, key=lambda one: one.generation).title if found else None


def _open(home: Home, spec: StudySpec, trials: int | None, *, trust: bool) -> Any:
    """Start or continue a study as a run would: both may take turns on one."""
    from hpo.data.prepare import prepare
    from hpo.data.split import split_card
    from hpo.execute.base_model import with_model
    from hpo.execute.budget import as_fitted
    from hpo.execute.run_study import refuse_new, with_options
    from hpo.options import RunOptions
    from hpo.search.lifecycle import open_study
    from hpo.search.stages import budget_of
    from hpo.tracking.tracker import Tracker

    spec = with_model(with_options(spec, RunOptions(trials=trials)), home, trust=trust)
    if (known := find_study(home, spec.name)) is not None:
        spec = as_fitted(spec, known.fitted, trials=trials is None)

    card = prepare(spec.data, spec.split)
    refuse_new(home, spec, card, fresh=False)
    handle = open_study(
        home,
        spec,
        data_digest=card.digest,
        class_names=card.class_names,
        budget=budget_of(spec, trials),
    )
    try:
        Tracker(home).open_study(handle.result(), handle.spec, card, split_card(card, spec.split))
    except BaseException:
        handle.close()
        raise
    return handle
