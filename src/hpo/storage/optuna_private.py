"""The private parts of Optuna that hpo depends on: all of them, each behind a function or class of this file.

PRIVATE_PARTS lists them. tests/storage/test_optuna_private.py names those that a release of Optuna lacks or changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.storages import RDBStorage
from optuna.study import _multi_objective
from optuna.trial import FrozenTrial

from hpo.storage.trial_attrs import attrs_of

# (owner, name, arguments that are passed to it; None: an attribute of instances).
PRIVATE_PARTS: tuple[tuple[Any, str, tuple[str, ...] | None], ...] = (
    (RDBStorage, "_create_new_trial", ("study_id", "template_trial")),
    (RDBStorage, "_get_trials", ("study_id", "states", "included_trial_ids", "trial_id_greater_than")),
    (
        RDBStorage,
        "_set_trial_param",
        ("trial_id", "param_name", "param_value_internal", "distribution", "previous_distribution"),
    ),
    (_multi_objective, "_fast_non_domination_rank", ("loss_values", "n_below")),
    (optuna.pruners.HyperbandPruner, "_get_bracket_id", ("study", "trial")),
    (optuna.pruners.HyperbandPruner, "_pruners", None),
    (optuna.pruners.HyperbandPruner, "_trial_allocation_budgets", None),
    (optuna.samplers.QMCSampler, "_find_sample_id", ("study", "search_space")),
    (FrozenTrial, "_trial_id", None),
    (optuna.trial.Trial, "_trial_id", None),
)

# Key of a study's system attributes: the name of each objective, which Optuna's plots and its dashboard show.
METRIC_NAMES = "study:metric_names"
# Keys of a trial's system attributes: values that were set before sampling; what successive halving of several
# objectives noted at a rung, without its step; the violation of a constraint, without its text.
FIXED, RUNG, CONSTRAINT = "fixed_params", "rung_at_step_", "constraints:"


def trial_id_of(trial: FrozenTrial | optuna.trial.Trial) -> int:
    """The id of a trial, unique in the storage; numbers are unique in a study only."""
    trial_id: int = trial._trial_id
    return trial_id


def create_trial(database: Any, study_id: int, template: FrozenTrial) -> FrozenTrial:
    """Create a trial and return it. Optuna's public method returns its id only, which takes a second read."""
    created: FrozenTrial = database._create_new_trial(study_id, template)
    return created


def read_trials(database: Any, study_id: int, *, ids: Collection[int], after: int) -> list[FrozenTrial]:
    """The trials with these ids up to `after`, and all with higher ids; after -1: every trial.

    Optuna's public method reads every trial each time.
    """
    trials: list[FrozenTrial] = database._get_trials(study_id, None, set(ids), after)
    return trials


def set_param(
    database: Any,
    trial_id: int,
    name: str,
    value: float,
    distribution: BaseDistribution,
    previous: BaseDistribution | None,
) -> None:
    """Store a parameter in Optuna's internal representation.

    previous is the distribution of this parameter in another trial, if known. Optuna's public method looks it up in the
    database for each parameter.
    """
    database._set_trial_param(trial_id, name, value, distribution, previous)


def domination_ranks(costs: NDArray[np.float64], *, least: int) -> NDArray[np.int_]:
    """The front (0: dominated by none) of each row of costs (trials, objectives), exact for the `least` best rows."""
    ranks: NDArray[np.int_] = _multi_objective._fast_non_domination_rank(costs, n_below=least)
    return ranks


class OrdinalHyperband(optuna.pruners.HyperbandPruner):  # type: ignore[misc]
    """Hyperband whose brackets follow the trial's ordinal in the study, from the first trial on.

    Optuna's follow the trial's number, which counts interrupted trials too. halving(bracket) is the pruner within one.
    """

    def __init__(self, halving: Callable[[int], optuna.pruners.BasePruner], **options: Any) -> None:
        super().__init__(**options)
        # Optuna creates the brackets at the first call of prune, and samples without them until then.
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(), pruner=self)
        self.prune(study, optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING))
        brackets = len(self._trial_allocation_budgets)
        self._pruners: list[Any] = [halving(bracket) for bracket in range(brackets)]

    def _get_bracket_id(self, study: Any, trial: FrozenTrial) -> int:
        return int(super()._get_bracket_id(study, at_ordinal(trial)))


class OrdinalQmc(optuna.samplers.QMCSampler):  # type: ignore[misc]
    """A point of the scrambled Sobol sequence: the one at `ordinal`, with a coordinate for each of `ranges`."""

    def __init__(self, *, seed: int, ordinal: int, ranges: Mapping[str, BaseDistribution]) -> None:
        super().__init__(scramble=True, seed=seed, warn_independent_sampling=False)
        self._ordinal = ordinal
        self._ranges = {name: one for name, one in ranges.items() if not one.single()}

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, BaseDistribution]:  # noqa: ARG002
        """The parameters that have more than one value."""
        return self._ranges

    def _find_sample_id(self, study: Any, search_space: Any) -> int:  # noqa: ARG002
        return self._ordinal


def at_ordinal(trial: FrozenTrial) -> FrozenTrial:
    """A copy of the trial whose number is its ordinal."""
    moved = copy.copy(trial)
    moved.number = attrs_of(trial).ordinal
    return moved
