"""The hypervolume of several objectives is that of Optuna, and grows trial by trial."""

from __future__ import annotations

import numpy as np
import pytest
from optuna._hypervolume import compute_hypervolume

from hpo.records import Candidate, StudyResult, Trial, TrialResult, TrialState
from hpo.report.hypervolume import hypervolume, hypervolume_history
from hpo.report.summary import study_summary


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_it_is_that_of_optuna(objectives):
    generator = np.random.default_rng(objectives)
    for count in (1, 5, 20):
        costs = generator.random((count, objectives))
        reference = np.ones(objectives)
        volume = hypervolume(costs, list(reference))
        assert volume == pytest.approx(compute_hypervolume(costs, reference))
        beyond = np.vstack([costs, np.full(objectives, 1.1)])
        assert hypervolume(beyond, list(reference)) == volume, "what is worse than the reference point adds nothing"


def _study(values, objectives=(("valid_accuracy", "maximize"), ("parameters", "minimize"))):
    trials = []
    for number, pair in enumerate(values):
        result = TrialResult(number, TrialState.COMPLETE, pair[0], 1, values=tuple(pair))
        trials.append(
            Trial(Candidate(number, number, {}, 1), TrialState.COMPLETE, result, started=10.0 - number, run_seconds=1.0)
        )
    return StudyResult("s", 1, "maximize", "valid_accuracy", tuple(trials), objectives=objectives)


def test_it_grows_in_the_order_in_which_trials_ended():
    # The later a trial's number, the earlier it ended. In the unit square, costs (1 - accuracy, log10 of parameters
    # from 10 to 1000) are (1, 0), (0, 1), (0.5, 0.5): only the last dominates an area.
    study = _study([(0.5, 10.0), (0.9, 1000.0), (0.7, 100.0)])
    history = hypervolume_history(study)
    assert [number for number, _ in history] == [2, 1, 0]
    assert [volume for _, volume in history] == pytest.approx([0.25, 0.25, 0.25])
    assert "Hypervolume: 0.250 of the box" in study_summary(study, winner=study.best)


def test_a_trial_that_is_best_in_all_dominates_the_whole_box():
    assert hypervolume_history(_study([(0.9, 10.0), (0.5, 1000.0)]))[-1][1] == pytest.approx(1.0)


def test_there_is_none_for_one_objective_or_where_all_agree_in_one():
    assert hypervolume_history(_study([(0.9,)], (("valid_accuracy", "maximize"),))) == []
    assert hypervolume_history(_study([(0.9, 10.0), (0.5, 10.0)])) == []
    assert hypervolume_history(_study([])) == []
