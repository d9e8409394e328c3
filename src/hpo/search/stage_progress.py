"""Where a search stands: which stage is being run, and whether it has anything left to hand out, from storage alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from hpo.search.stages import Stage, find_origins, make_stage, stage_names
from hpo.search.strategy import Proposer
from hpo.spec.study import StudySpec
from hpo.storage.optuna_storage import STUDY, Storage, to_result
from hpo.storage.trial_index import Books, Tally

_STAGE = "hpo.stage."  # + name, in the study's attributes: where a stage started, once it has


@dataclass(frozen=True)
class Step:
    """A stage being run, and who proposes its candidates; last: no stage follows."""

    stage: Stage
    proposer: Proposer
    last: bool

    def full(self, tally: Tally) -> bool:
        """Whether there is no new candidate to hand out; tally is the stage's."""
        spent = self.stage.limit is not None and tally.total >= self.stage.limit
        return spent or self.proposer.exhausted


class Plan:
    """The stages of one study in the storage; number is Optuna's of the study."""

    def __init__(self, spec: StudySpec, storage: Storage, number: int) -> None:
        self._spec = spec
        self._storage = storage
        self._number = number
        self._names = stage_names(spec)
        self._steps: dict[int, Step] = {}
        self._rollbacks = storage.rollbacks

    def tally(self, books: Books) -> Tally:
        """What counts of the search."""
        return books.tally(self._names)

    def current(self, books: Books) -> Step | None:
        """The first stage that is not complete; None after the last. Raises SpecError where one cannot start."""
        if self._rollbacks != self._storage.rollbacks:
            self._steps, self._rollbacks = {}, self._storage.rollbacks
        for index in range(len(self._names)):
            step = self._step(index)
            tally = books.tally([step.stage.name])
            if tally.waiting or tally.running or not step.full(tally):
                return step
        return None

    def _step(self, index: int) -> Step:
        """A stage, once those before it are complete. Where it starts is decided once and written down."""
        if index not in self._steps:
            attributes = self._storage.get_study_user_attrs(self._number)
            place = f"{_STAGE}{self._names[index]}"
            if index and place not in attributes:
                study = to_result(attributes[STUDY], self._storage.records(self._number))
                attributes[place] = {"origins": list(find_origins(self._spec, index, study).items())}
                self._storage.set_study_user_attr(self._number, place, attributes[place])
            origins = dict(attributes[place]["origins"]) if index else {}
            stage = make_stage(self._spec, index, origins=origins, warm=attributes[STUDY].get("start", []))
            last = index == len(self._names) - 1
            self._steps[index] = Step(stage, Proposer(stage, partial(self._storage.books, self._number)), last)
        return self._steps[index]
