"""Successive halving with several objectives: fronts first, and the trials of a front spread over it."""

from __future__ import annotations

import numpy as np
import pytest

from hpo.errors import SpecError
from hpo.records import TrialResult, TrialState
from hpo.search.halving import best_first
from hpo.search.lifecycle import open_study

TWO = {
    "objectives": ["valid_accuracy", "parameters"],
    "space": {"model.dropout": {"float": [0.0, 0.9]}},
}


def halving(make_spec, first=1, factor=3, **search):
    spec = make_spec(**TWO, **search)
    changes = {"name": "successive_halving", "min_epochs": first, "reduction_factor": factor}
    part = spec.search.pruner.model_copy(update=changes)
    return spec.model_copy(update={"search": spec.search.model_copy(update={"pruner": part})})


def test_one_objective_is_sorted_and_of_equal_trials_the_earlier_is_better():
    assert best_first(np.array([[3.0], [1.0], [2.0], [1.0]])) == [1, 3, 2, 0]


def test_fronts_come_one_after_the_other_and_the_first_of_each_are_spread_over_it():
    # By ranks, the ends of the front are farthest from each other, and then its middle is.
    front = [[0.0, 8.0], [1.0, 5.0], [2.0, 3.0], [4.0, 1.0], [8.0, 0.0]]
    dominated = [[5.0, 5.0], [2.0, 9.0]]
    assert best_first(np.array([*dominated, *front])) == [2, 6, 4, 3, 5, 1, 0]


def test_the_order_does_not_depend_on_the_units():
    generator = np.random.default_rng(0)
    costs = generator.random((40, 3))
    assert best_first(costs) == best_first(costs * [1.0, 1e6, 1e-3] + [5.0, -2.0, 0.0])
    assert sorted(best_first(costs)) == list(range(40))


def test_a_trial_continues_if_it_is_among_the_best_third_of_its_rung(home, make_spec):
    study = open_study(home, halving(make_spec), data_digest="d")
    # (accuracy, parameters) after the first epoch, and whether the trial is ended then.
    course = [
        ((0.5, 100.0), False),  # the first
        ((0.4, 200.0), True),  # dominated
        ((0.9, 900.0), True),  # on the front, but of three trials one continues: the best in the first objective, ...
        ((0.95, 950.0), False),  # ... which is this one
        ((0.6, 90.0), True),  # of five still one
        ((0.3, 10.0), False),  # of six two: the most accurate, and the one farthest from it
    ]
    seen = []
    for values, _ in course:
        trial = study.ask(budget=99, worker="w")
        pruned = study.report(trial.number, 1, values)
        assert study.report(trial.number, 1, values) is pruned, "reported again"
        seen.append(pruned)
        state = TrialState.PRUNED if pruned else TrialState.COMPLETE
        scores = dict(zip(("valid_accuracy", "parameters"), values, strict=True))
        study.tell(TrialResult(trial.number, state, scores=scores))
    study.close()
    # The third is better in the first objective than all before it.
    assert seen == [False, True, False, False, True, False]


def test_between_rungs_nothing_is_ended_and_what_is_not_finite_is_at_the_next(home, make_spec):
    study = open_study(home, halving(make_spec), data_digest="d")
    good = study.ask(budget=99, worker="w")
    assert [study.report(good.number, epoch, (0.9, 10.0)) for epoch in (1, 2, 3)] == [False] * 3
    odd = study.ask(budget=99, worker="w")
    assert study.report(odd.number, 1, (0.95, 5.0)) is False
    assert study.report(odd.number, 2, (float("nan"), 5.0)) is False
    assert study.report(odd.number, 3, (float("nan"), 5.0)) is True
    study.close()


def test_without_a_pruner_several_objectives_are_never_pruned(home, make_spec):
    study = open_study(home, make_spec(**TWO), data_digest="d")
    for accuracy in (0.9, 0.1, 0.2):
        trial = study.ask(budget=99, worker="w")
        assert study.report(trial.number, 1, (accuracy, 10.0)) is False
    study.close()


def trained(study, curve):
    """The epoch in which the pruner ends a trial of this curve of accuracies; None where it does not."""
    number = study.ask(budget=99, worker="w").number
    ends = (epoch for epoch, value in enumerate(curve, 1) if study.report(number, epoch, (value, 10.0)))
    end = next(ends, None)
    scores = {"valid_accuracy": curve[(end or len(curve)) - 1], "parameters": 10.0}
    study.tell(TrialResult(number, TrialState.PRUNED if end else TrialState.COMPLETE, scores=scores))
    return end


@pytest.mark.parametrize("off_between", [False, True])
def test_rungs_that_have_moved_compare_trials_at_the_same_epoch(home, make_spec, off_between):
    def resumed(spec, *curves):
        study = open_study(home, spec, data_digest="d")
        ends = [trained(study, curve) for curve in curves]
        study.close()
        return ends

    rising = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    late = [0.11, 0.21, 0.31, 0.41, 0.51, 0.2, 0.2, 0.2, 0.2]
    assert resumed(halving(make_spec, 6), rising, late) == [None, 6]
    if off_between:
        assert resumed(make_spec(**TWO), rising) == [None]
    # At epoch 1 nobody had a rung. By its index the first one of then had 0.6, of epoch 6.
    assert resumed(halving(make_spec, 1, 6), late) == [6]
    # What had a rung at the same epoch is compared with, although it was another rung then.
    assert resumed(halving(make_spec, 2), [0.9, 0.9, 0.9, 0.9, 0.9, 0.5, 0.9, 0.9, 0.9]) == [6]


def test_another_pruner_is_refused(make_spec):
    with pytest.raises(SpecError, match="pruner median compares one objective only"):
        make_spec("random", "median", **TWO)
