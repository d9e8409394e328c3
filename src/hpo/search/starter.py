"""The start of trials: which candidate a worker gets next, and its trial in Optuna's storage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial

from hpo.errors import StoreError
from hpo.records import FINAL, Candidate, TrialResult, TrialState
from hpo.search.gaussian_process import one_thread
from hpo.search.growth import ends_of, in_ranges, narrowed_since, times_grown
from hpo.search.pruners import build_pruner
from hpo.search.results import template
from hpo.search.samplers import StageProgress, StageSampler, Step
from hpo.search.stages import Stage, encode, suggest
from hpo.search.thaw import PausedTrials
from hpo.spec.study import StudySpec
from hpo.storage.optuna_private import trial_id_of
from hpo.storage.optuna_storage import Storage
from hpo.storage.stage_view import StageView
from hpo.storage.trial_attrs import (
    ASKED,
    PAUSE,
    RESULT,
    START,
    STUDY,
    TrialAttrs,
    attrs_of,
    key_of,
    result_of,
    state_of,
)
from hpo.storage.trial_index import TrialIndex


class Starter:
    """Starts the trials of one study (study_id is Optuna's) in the name of the supervisor with this lease.

    Its caller holds the lock of the study. waits: a supervisor stays while trials of others run. grown: how often the
    space had grown when the study was opened. exhausted and blocked are those of Study, after the last call. continued
    holds the trials that were paused and run again, by number, with the result that they had when they were paused.
    """

    def __init__(
        self, spec: StudySpec, storage: Storage, study_id: int, *, title: str, lease: str, waits: bool, grown: int
    ) -> None:
        self.exhausted = self.blocked = False
        self.continued: dict[int, TrialResult] = {}
        self.pruner = build_pruner(spec)
        self.progress = StageProgress(spec, storage, study_id)
        self.paused = PausedTrials(spec)
        self._spec, self._storage, self._id = spec, storage, study_id
        self._title, self._lease, self._waits, self._grown = title, lease, waits, grown
        self._ends = ends_of(spec.search.model_dump(mode="json"))

    def view(self, stage: str | None, *, sampled: bool) -> StageView:
        """The trials of a stage as pruners see them."""
        return StageView(self._storage, self._title, self._id, stage, sampled=sampled)

    def sampler_view(self, stage: Stage) -> StageView:
        """The trials of a stage as its sampler sees them."""
        return StageView(self._storage, self._title, self._id, stage.name, sampled=True, seen=in_ranges(stage))

    def check_space(self) -> None:
        """Raise StoreError where another supervisor has changed the space since the study was opened."""
        record = self._storage.database.get_study_user_attrs(self._id).get(STUDY, {})
        if times_grown(record) != self._grown or narrowed_since(self._ends, record):
            raise StoreError(
                f"{self._title}: its space has changed meanwhile.",
                f"Start this run again: hpo run {self._title.partition('~')[0]}",
            )

    @one_thread()
    def next(self, budget: int, worker: str, resumable: Callable[[Candidate], bool]) -> tuple[Trial, TrialAttrs] | None:
        """The trial of the next candidate and its record; None where there is none now, see Study.ask."""
        self.check_space()
        index = self._storage.index(self._id)
        counts = self.progress.count(index)
        self.exhausted = self.blocked = False
        spent = counts.running + counts.ended >= budget
        if (spent or not counts.waiting) and (promoted := self.paused.promoted(index, resumable)) is not None:
            return self._continue(promoted, worker)
        if spent:
            # Final trainings follow once the last result is in.
            self.blocked = self._waits and self._supervised(index)
            return None
        step = self.progress.current(index)
        if step is None:
            self.exhausted = True
            return None
        stage, sampler = step.stage, step.sampler
        own = index.count([stage.name])
        if not own.waiting and step.is_full(own):
            self.exhausted = step.last
            self.blocked = not step.last or self._waits or sampler.undrawn > 0
            return None
        trial = self._pop(self.sampler_view(stage), sampler) if own.waiting else self._begin(step, index)
        stored = trial.user_attrs.get(START)
        attrs = TrialAttrs(**stored) if stored else TrialAttrs(ordinal=index.first_tries(before=trial.number))
        parameters = stage.parameters(self._suggest(trial, stage, sampler))
        seed = parameters.get("training.seed", self._spec.training.seed)
        seed = self._spec.seed_of(attrs.ordinal) if seed is None else seed
        return self._sign(trial, replace(attrs, parameters=parameters, seed=seed), worker)

    def earlier(self, candidate: Candidate) -> TrialResult | None:
        """The result of an earlier trial that the candidate reuses, if the spec says so."""
        if self._spec.search.duplicates != "reuse" or candidate.number in self.continued:
            return None
        same = self._storage.index(self._id).ended(candidate.stage).with_key(key_of(candidate.parameters))
        complete = [trial for trial in same if state_of(trial) is TrialState.COMPLETE]
        return result_of(min(complete, key=lambda trial: trial.number)) if complete else None

    def _supervised(self, index: TrialIndex) -> bool:
        """Whether a trial runs that a supervisor will end; a program of the user's own may never tell its."""
        running = (trial for trial in index.open.values() if state_of(trial) is TrialState.RUNNING)
        return any(attrs_of(trial).lease != ASKED for trial in running)

    def _continue(self, paused: FrozenTrial, worker: str) -> tuple[Trial, TrialAttrs]:
        """Start a paused trial again, in this order: after a kill between two steps it is paused, or reaped as that."""
        attrs = attrs_of(paused)
        if (result := result_of(paused)) is not None:
            self.continued[paused.number] = result
        trial, signed = self._again(paused, attrs, worker)
        trial.set_user_attr(PAUSE, 0)
        trial.set_user_attr(RESULT, None)
        return trial, signed

    def take_over(self, title: str, number: int) -> Trial:
        """A running trial of a program of the user's own, now of this supervisor. Raises StoreError for another one."""
        found = self._storage.index(self._id).open.get(number)
        if found is None or state_of(found) is not TrialState.RUNNING or attrs_of(found).lease != ASKED:
            raise StoreError(f"{title}#{number}: hpo ask has handed out no such trial.", f"Ask: hpo ask {title}")
        return self._again(found, attrs_of(found), attrs_of(found).worker)[0]

    def _again(self, begun: FrozenTrial, attrs: TrialAttrs, worker: str) -> tuple[Trial, TrialAttrs]:
        # Its parameters are there: nothing is to be sampled.
        sampler = optuna.samplers.RandomSampler(seed=0)
        study = self.view(attrs.stage, sampled=False).study(sampler=sampler, pruner=self.pruner)
        if self._storage.shared:  # its last heartbeat is old, and others would take it for abandoned
            self._storage.database.record_heartbeat(trial_id_of(begun))
        return self._sign(Trial(study, trial_id_of(begun)), attrs, worker)

    def _begin(self, step: Step, index: TrialIndex) -> Trial:
        """Start a new candidate of the stage; the first ones have the values of Stage.first."""
        stage, position = step.stage, index.first_tries([step.stage.name])
        attrs = TrialAttrs(ordinal=index.first_tries(), stage=stage.name, lease=self._lease)
        values = stage.first[position] if position < len(stage.first) else {}
        if not step.sampler.accepts(values):
            values = {}
        fixed = {stage.label(path): encode(stage.space[path], value) for path, value in values.items()}
        view = self.sampler_view(stage)
        study = view.study(sampler=step.sampler, pruner=self.pruner)
        return view.begin_trial(study, template(optuna.trial.TrialState.RUNNING, attrs, fixed))

    def _pop(self, view: StageView, sampler: Any) -> Trial:
        """Start the first waiting trial of a stage; there must be one."""
        return view.study(sampler=sampler, pruner=self.pruner).ask()

    def _suggest(self, trial: Trial, stage: Stage, sampler: StageSampler) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while parameters := sampler.active(values):
            path, parameter = parameters[0]
            values[path] = suggest(trial, stage.label(path), parameter)
        return values

    def _sign(self, trial: Trial, attrs: TrialAttrs, worker: str) -> tuple[Trial, TrialAttrs]:
        attrs = replace(attrs, worker=worker, lease=self._lease)
        trial.set_user_attr(START, attrs.to_json())
        return trial, attrs

    def next_final(self, worker: str) -> tuple[Trial, TrialAttrs] | None:
        """The trial of the next final training and its record; None where none waits."""
        counts = self._storage.index(self._id).count([FINAL])
        self.blocked = not counts.waiting and counts.running > 0
        if not counts.waiting:
            return None
        trial = self._pop(self.view(FINAL, sampled=True), optuna.samplers.RandomSampler(seed=0))
        attrs = TrialAttrs(**trial.user_attrs[START])
        if attrs.final is None and self._spec.final is not None:  # enqueued by an earlier version
            attrs = replace(attrs, final=self._spec.final.settings)
        return self._sign(trial, attrs, worker)
