"""One stage of a study in the form of an Optuna storage, for samplers and pruners."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from hpo.storage.optuna_private import trial_id_of
from hpo.storage.optuna_storage import Storage


def _forward(name: str) -> Any:
    def forward(self: StageView, *arguments: Any, **options: Any) -> Any:
        return getattr(self.storage.database, name)(*arguments, **options)

    return forward


class StageView(BaseStorage):  # type: ignore[misc]
    """One stage of one study in the form of an Optuna storage: the trials that samplers and pruners may see.

    These are the trials of the stage that were not interrupted; a retry is seen in place of an interrupted trial.
    sampled: only a sample of a long stage is seen, see EndedTrials.sample. seen is how each trial is seen; None: not at
    all.
    """

    def __init__(
        self,
        storage: Storage,
        title: str,
        study_id: int,
        stage: str | None,
        *,
        sampled: bool,
        seen: Callable[[FrozenTrial], FrozenTrial | None] = lambda trial: trial,
    ) -> None:
        self.storage = storage
        self._title, self._id, self._stage, self._sampled, self._seen = title, study_id, stage, sampled, seen
        self._created: FrozenTrial | None = None
        self._notes: dict[int, dict[str, Any]] = {}  # system attributes by Optuna's id of the trial

    def study(self, *, sampler: Any, pruner: Any) -> optuna.Study:
        """Optuna's study of this stage."""
        return optuna.load_study(study_name=self._title, storage=self, sampler=sampler, pruner=pruner)

    def begin_trial(self, study: optuna.Study, template: FrozenTrial) -> optuna.trial.Trial:
        """Create a running trial with the contents of the template; its parameters are sampled as they are asked for.

        Study.ask of Optuna would enqueue the trial first.
        """
        self._created = self.storage.create_trial(self._id, template)
        return optuna.trial.Trial(study, trial_id_of(self._created))

    def get_all_trials(self, study_id: int, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:  # noqa: ARG002
        """The visible trials of the stage by number."""
        index = self.storage.index(self._id)
        ended = index.ended(self._stage)
        trials = [*(ended.sample() if self._sampled else ended.visible), *index.unfinished(self._stage)]
        if states is not None:
            trials = [trial for trial in trials if trial.state in states]
        trials = [seen for trial in trials if (seen := self._seen(trial)) is not None]
        trials.sort(key=lambda trial: trial.number)
        return copy.deepcopy(trials) if deepcopy else trials

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """The trial as it is now; one that was just created is not read again."""
        created, self._created = self._created, None
        if created is not None and trial_id_of(created) == trial_id:
            return copy.deepcopy(created)
        return self.storage.database.get_trial(trial_id)

    def get_trial_system_attrs(self, trial_id: int) -> dict[str, Any]:
        """The system attributes of a trial, read once: while it runs, only samplers and pruners of this view add any.

        Pruners ask for them after each epoch, and Optuna would read the whole trial with all its reports for that.
        """
        if trial_id not in self._notes:
            self._notes[trial_id] = self.storage.database.get_trial_system_attrs(trial_id)
        return self._notes[trial_id]

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Store a system attribute."""
        self.storage.database.set_trial_system_attr(trial_id, key, value)
        self.get_trial_system_attrs(trial_id)[key] = value

    def get_study_id_from_name(self, study_name: str) -> int:  # noqa: ARG002
        """Optuna's id of the study."""
        return self._id

    def get_study_name_from_id(self, study_id: int) -> str:  # noqa: ARG002
        """The title of the study."""
        return self._title

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """The direction of each objective."""
        return self.storage.directions(study_id)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Not called: trials are created by begin_trial or wait in the queue."""
        raise NotImplementedError

    def set_trial_param(self, trial_id: int, param_name: str, param_value_internal: float, distribution: Any) -> None:
        """Store a parameter."""
        self.storage.set_param(self._id, trial_id, param_name, param_value_internal, distribution)

    create_new_study = _forward("create_new_study")
    delete_study = _forward("delete_study")
    get_all_studies = _forward("get_all_studies")
    get_study_user_attrs = _forward("get_study_user_attrs")
    get_study_system_attrs = _forward("get_study_system_attrs")
    set_study_user_attr = _forward("set_study_user_attr")
    set_study_system_attr = _forward("set_study_system_attr")
    set_trial_state_values = _forward("set_trial_state_values")
    set_trial_intermediate_value = _forward("set_trial_intermediate_value")
    set_trial_user_attr = _forward("set_trial_user_attr")
