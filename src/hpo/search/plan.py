"""Where a search stands: which stage is being run, and whether it has anything left to hand out, from storage alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from optuna.trial import FrozenTrial

from hpo.records import FINAL, TrialState
from hpo.search.stages import Stage, find_origins, make_stage, stage_names
from hpo.search.storage import STUDY, Storage, stage_of, start_of, state_of, to_result
from hpo.search.strategy import Proposer
from hpo.spec.study import StudySpec

_STAGE = "hpo.stage."  # + name, in the study's attributes: where a stage started, once it has


@dataclass(frozen=True)
class Step:
    """A stage being run, and who proposes its candidates; last: no stage follows."""

    stage: Stage
    proposer: Proposer
    last: bool

    def of(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """Those trials that are of this stage."""
        return [trial for trial in trials if stage_of(trial) == self.stage.name]

    def full(self, counted: list[FrozenTrial]) -> bool:
        """Whether there is no new candidate to hand out."""
        spent = self.stage.limit is not None and len(self.of(counted)) >= self.stage.limit
        return spent or self.proposer.exhausted


class Plan:
    """The stages of one study in the storage; number is Optuna's of the study."""

    def __init__(self, spec: StudySpec, storage: Storage, number: int) -> None:
        self._spec = spec
        self._storage = storage
        self._number = number
        self._names = stage_names(spec)
        self._steps: dict[int, Step] = {}

    def counted(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """Those of the search that were not interrupted and are not run again."""
        again = {start_of(trial).retry_of for trial in trials}
        return [
            trial
            for trial in trials
            if stage_of(trial) in self._names
            and state_of(trial) is not TrialState.STOPPED
            and trial.number not in again
        ]

    def current(self, counted: list[FrozenTrial]) -> Step | None:
        """The first stage that is not complete; None after the last. Raises SpecError where one cannot start."""
        for index in range(len(self._names)):
            step = self._step(index)
            ended = all(trial.state.is_finished() for trial in step.of(counted))
            if not (ended and step.full(counted)):
                return step
        return None

    def _step(self, index: int) -> Step:
        """A stage, once those before it are complete. Where it starts is decided once and written down."""
        if index not in self._steps:
            attributes = self._storage.get_study_user_attrs(self._number)
            place = f"{_STAGE}{self._names[index]}"
            if index and place not in attributes:
                study = to_result(attributes[STUDY], self._storage.every_trial(self._number))
                attributes[place] = {"origins": list(find_origins(self._spec, index, study).items())}
                self._storage.set_study_user_attr(self._number, place, attributes[place])
            origins = dict(attributes[place]["origins"]) if index else {}
            stage = make_stage(self._spec, index, origins=origins, warm=attributes[STUDY].get("start", []))
            last = index == len(self._names) - 1
            self._steps[index] = Step(stage, Proposer(stage, self._trials_of(stage)), last)
        return self._steps[index]

    def _trials_of(self, stage: Stage) -> Callable[[], list[FrozenTrial]]:
        def trials() -> list[FrozenTrial]:
            return [trial for trial in self._storage.every_trial(self._number) if stage_of(trial) == stage.name]

        return trials


def first_tries(trials: list[FrozenTrial], *, before: float = math.inf) -> int:
    """How many candidates of the search the trials are: those with a number below `before`."""
    ours = (trial for trial in trials if trial.number < before and stage_of(trial) != FINAL)
    return sum(start_of(trial).retry_of is None for trial in ours)
