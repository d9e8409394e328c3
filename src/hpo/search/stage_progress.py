"""The progress of a search: which stage is being run, and whether it has further candidates, from storage alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from hpo.search.samplers import StageSampler
from hpo.search.stages import Stage, find_origins, make_stage, stage_names
from hpo.spec.study import StudySpec
from hpo.storage.optuna_storage import Storage
from hpo.storage.reader import to_result
from hpo.storage.trial_attrs import STUDY
from hpo.storage.trial_index import TrialCounts, TrialIndex

_STAGE = "hpo.stage."  # + name, a key of the study's attributes: the origins of a stage that has started


@dataclass(frozen=True)
class Step:
    """A stage being run, and its sampler; last: no stage follows."""

    stage: Stage
    sampler: StageSampler
    last: bool

    def is_full(self, counts: TrialCounts) -> bool:
        """Whether there is no new candidate; counts are the stage's."""
        spent = self.stage.limit is not None and counts.total >= self.stage.limit
        return spent or self.sampler.exhausted


class StageProgress:
    """The stages of one study in the storage; study_id is Optuna's."""

    def __init__(self, spec: StudySpec, storage: Storage, study_id: int) -> None:
        self._spec = spec
        self._storage = storage
        self._id = study_id
        self._names = stage_names(spec)
        self._steps: dict[int, Step] = {}
        self._rollbacks = storage.rollbacks

    def count(self, index: TrialIndex) -> TrialCounts:
        """The number of trials of the search that count."""
        return index.count(self._names)

    def current(self, index: TrialIndex) -> Step | None:
        """The first stage that is not complete; None after the last. Raises SpecError where one cannot start."""
        if self._rollbacks != self._storage.rollbacks:
            self._steps, self._rollbacks = {}, self._storage.rollbacks
        for position in range(len(self._names)):
            step = self._step(position)
            counts = index.count([step.stage.name])
            if counts.waiting or counts.running or not step.is_full(counts):
                return step
        return None

    def _step(self, position: int) -> Step:
        """A stage, once those before it are complete. Its origins are chosen once and stored."""
        if position not in self._steps:
            attributes = self._storage.database.get_study_user_attrs(self._id)
            key = f"{_STAGE}{self._names[position]}"
            if position and key not in attributes:
                study = to_result(attributes[STUDY], self._storage.records(self._id))
                attributes[key] = {"origins": list(find_origins(self._spec, position, study).items())}
                self._storage.database.set_study_user_attr(self._id, key, attributes[key])
            origins = dict(attributes[key]["origins"]) if position else {}
            stage = make_stage(self._spec, position, origins=origins, warm=attributes[STUDY].get("start", []))
            sampler = StageSampler(stage, partial(self._storage.index, self._id))
            self._steps[position] = Step(stage, sampler, last=position == len(self._names) - 1)
        return self._steps[position]
