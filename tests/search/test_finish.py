"""The one function that makes the final result of a trial."""

import math

import pytest

from formula_study import formula_spec
from hpo.records import FailureKind, TrialResult, TrialState
from hpo.search.results import final_result

ACCURACY = {"valid_accuracy": 0.5}
AIMS = [{"score": "valid_accuracy"}, {"score": "parameters"}]


def _result(state=TrialState.COMPLETE, **changes):
    return TrialResult(0, state, **changes)


def test_the_objective_becomes_the_value_unless_one_is_given():
    assert final_result(formula_spec(), _result(scores=ACCURACY)).value == 0.5
    assert final_result(formula_spec(), _result(TrialState.PRUNED, scores=ACCURACY)).value == 0.5
    assert final_result(formula_spec(), _result(value=0.7), final=True).value == 0.7


@pytest.mark.parametrize("scores", [{}, {"valid_accuracy": math.nan}, {"valid_accuracy": math.inf}])
def test_a_complete_trial_without_a_finite_objective_fails(scores):
    ended = final_result(formula_spec(), _result(scores=scores))
    assert (ended.state, ended.value, ended.failure) == (TrialState.FAILED, None, FailureKind.NOT_FINITE)
    assert "valid_accuracy is" in ended.reason


def test_each_objective_must_be_finite_but_in_final_trainings():
    spec = formula_spec(objectives=AIMS)
    assert final_result(spec, _result(scores={**ACCURACY, "parameters": 9.0})).values == (0.5, 9.0)
    lacking = _result(scores=ACCURACY)
    assert "the objective parameters is nan" in final_result(spec, lacking).reason
    assert final_result(spec, lacking, final=True).state is TrialState.COMPLETE


def test_a_broken_constraint_makes_a_trial_infeasible():
    spec = formula_spec(constraints=["parameters <= 10"])
    sizes = [final_result(spec, _result(scores={**ACCURACY, "parameters": size})).feasible for size in (9.0, 11.0)]
    assert sizes == [True, False]


def test_three_deaths_make_a_stopped_trial_a_failed_one():
    lost = _result(TrialState.STOPPED, reason="its worker died")
    assert final_result(formula_spec(), lost, deaths=2) == lost
    ended = final_result(formula_spec(), lost, deaths=3)
    assert (ended.state, ended.failure) == (TrialState.FAILED, FailureKind.WORKER_DIED)
    assert "its worker died" in ended.reason


@pytest.mark.parametrize("state", TrialState)
@pytest.mark.parametrize("scores", [{}, ACCURACY, {**ACCURACY, "parameters": 11.0}])
@pytest.mark.parametrize("search", [{}, {"objectives": AIMS}, {"constraints": ["parameters <= 10"]}])
def test_a_result_that_was_left_on_disk_and_comes_again_ends_the_same(state, scores, search):
    spec = formula_spec(**search)
    once = final_result(spec, _result(state, scores=scores), deaths=3)
    twice = final_result(spec, TrialResult.from_json(once.to_json()), deaths=3)
    assert repr(twice) == repr(once)
