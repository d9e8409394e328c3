"""Learning curves: who is ended early because of how others went on."""

import math

import numpy as np
import optuna
import pytest

from formula import NUMERIC, objective, run_all
from hpo.records import TrialResult, TrialState
from hpo.search.halving import Halving, rung_values
from hpo.search.lifecycle import open_study
from hpo.search.pruners import CurvePruner, build_pruner, chance_to_beat, pruner_warnings, running_best, score_and_gain

EPOCHS = 10


def _curves(count=12, *, seed=0):
    """Scores that rise along power laws to a final level, with a little noise: (count, EPOCHS)."""
    random = np.random.default_rng(seed)
    tops = random.uniform(0.5, 0.95, count)
    curves = tops[:, None] - 0.4 * np.arange(1, EPOCHS + 1) ** -0.8 + random.normal(0, 0.003, (count, EPOCHS))
    return np.maximum.accumulate(curves, axis=1)


def _chance(curve, *, best=None, epochs=4):
    curves = _curves()
    finals = curves[:, -1]
    return _forecast(finals.max() if best is None else best, curve, curves, finals, epochs=epochs)


def _forecast(best, curve, curves, finals, *, epochs):
    earlier = np.array([score_and_gain(other, epochs) for other in curves])
    return chance_to_beat(best, np.array(score_and_gain(curve, epochs)), earlier, finals)


def test_a_curve_above_all_others_will_beat_the_best_and_one_below_will_not():
    best = max(_curves(), key=lambda curve: curve[-1])
    assert _chance(best + 0.05) > 0.95
    assert 0.2 < _chance(best) < 0.8
    assert _chance(best - 0.15) < 0.05


def test_the_chance_falls_with_what_is_to_be_beaten():
    curve = _curves()[3]
    chances = [_chance(curve, best=best) for best in np.linspace(0, 1.5, 16)]
    assert chances == sorted(chances, reverse=True)
    assert chances[0] > 0.99 > 0.01 > chances[-1]


def test_a_steeper_curve_at_the_same_level_has_the_better_chance():
    # Late starters overtake: those that gained more in the last epochs gain more from here on.
    steep = np.linspace(0, 0.4, 20)
    curves = np.array([[0.5 - rise, 0.5 - rise, 0.5] for rise in steep])
    finals = 0.5 + steep
    flat, rising = np.array([0.5, 0.5, 0.5]), np.array([0.2, 0.2, 0.5])
    chances = [_forecast(0.7, curve, curves, finals, epochs=3) for curve in (flat, rising)]
    assert chances[0] < 0.05 < 0.9 < chances[1]


def test_few_trials_forecast_with_less_confidence_than_many():
    curve = min(_curves(), key=lambda curve: curve[-1])
    few, many = _curves(3, seed=1), _curves(200, seed=1)
    wide, narrow = (_forecast(curve[-1] + 0.05, curve, part, part[:, -1], epochs=4) for part in (few, many))
    assert narrow < wide


def test_trials_that_ended_all_alike_are_no_reason_to_fail():
    curves = np.full((4, 3), 0.1)
    assert _forecast(0.1, curves[0], curves, curves[:, -1], epochs=3) == 0.0
    assert _forecast(0.1, np.array([0.1, 0.1, 0.9]), curves, curves[:, -1], epochs=3) > 0.5


def test_what_a_trial_reported_becomes_its_best_so_far():
    assert running_best({1: 0.2, 3: 0.1, 4: 0.5}, 1.0).tolist() == [0.2, 0.2, 0.2, 0.5]
    assert running_best({1: 0.2, 2: float("nan"), 3: 0.1}, -1.0).tolist() == [-0.2, -0.2, -0.1]


def _study(direction="maximize", *, count=12):
    sign = 1 if direction == "maximize" else -1
    pruner = CurvePruner(startup_trials=5, warmup_epochs=1, threshold=0.1)
    study = optuna.create_study(direction=direction, pruner=pruner)
    for curve in _curves(count):
        trial = study.ask()
        for epoch, value in enumerate(curve, 1):
            trial.report(sign * value, epoch)
        study.tell(trial, sign * curve[-1])
    return study


def _verdicts(study, curve):
    """After which epochs the trial would be pruned."""
    trial, pruned = study.ask(), []
    for epoch, value in enumerate(curve, 1):
        trial.report(value, epoch)
        if trial.should_prune():
            pruned.append(epoch)
    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    return pruned


@pytest.mark.parametrize(("direction", "sign"), [("maximize", 1), ("minimize", -1)])
def test_hopeless_trials_end_after_the_warmup_and_good_ones_go_on(direction, sign):
    study = _study(direction)
    assert _verdicts(study, [sign * value for value in _curves().max(0) + 0.02]) == []
    assert _verdicts(study, [sign * 0.1] * EPOCHS)[0] == 2


def test_nobody_is_pruned_before_enough_trials_have_finished():
    assert _verdicts(_study(count=4), [0.1] * EPOCHS) == []


def test_a_trial_that_breaks_a_constraint_is_not_the_one_to_beat(home, make_spec):
    # The large networks are the better ones, and too large.
    spec = make_spec(
        "random", "curve", {"model.hidden": {"int": [1, 100]}}, constraints=["parameters <= 3000"], trials=40
    )
    study = open_study(home, spec, data_digest="d")
    states = {}
    while candidate := study.ask(budget=40, worker="w"):
        hidden = candidate.parameters["model.hidden"]
        feasible = hidden <= 40
        value = hidden / 100
        for epoch in range(1, 10):
            pruned = study.report(candidate.number, epoch, value * epoch / 9)
            if pruned:
                break
        state = TrialState.PRUNED if pruned else TrialState.COMPLETE
        states[candidate.number] = (hidden, state)
        scores = {"parameters": 75.0 * hidden}
        study.tell(TrialResult(candidate.number, state, value, 9, scores=scores, feasible=feasible))
    study.close()
    best = max(hidden for hidden, _ in states.values() if hidden <= 40)
    assert (best, TrialState.COMPLETE) in states.values()
    assert any(state is TrialState.PRUNED for _, state in states.values())


@pytest.mark.slow
def test_a_search_with_the_curve_pruner_keeps_its_best(home, make_spec):
    results = {}
    for pruner in ("none", "curve"):
        study = open_study(home, make_spec("random", pruner, NUMERIC, name=pruner), data_digest="d")
        run_all(study, 40, 9)
        results[pruner] = study.result()
        study.close()
    assert results["curve"].count(TrialState.PRUNED) > 10
    assert results["curve"].best.candidate.parameters == results["none"].best.candidate.parameters
    assert results["curve"].best.value == objective(results["none"].best.candidate.parameters)


def _told(study, value, epochs):
    """Train a candidate whose score rises to value, and whether it was pruned."""
    candidate = study.ask(budget=99, worker="w")
    for epoch in range(1, epochs + 1):
        if study.report(candidate.number, epoch, value * epoch / epochs):
            study.tell(TrialResult(candidate.number, TrialState.PRUNED, value * epoch / epochs, epoch))
            return epoch
    study.tell(TrialResult(candidate.number, TrialState.COMPLETE, value, epochs))
    return None


def _halving(make_spec, first, name="successive_halving", factor=3, **search):
    spec = make_spec(space=NUMERIC, **search)
    part = spec.search.pruner.model_copy(update={"name": name, "min_epochs": first, "reduction_factor": factor})
    return spec.model_copy(update={"search": spec.search.model_copy(update={"pruner": part})})


def test_rungs_that_have_moved_compare_trials_at_the_same_epoch(home, make_spec):
    study = open_study(home, _halving(make_spec, 6), data_digest="d")
    assert [_told(study, value, EPOCHS) for value in (0.5, 0.1, 0.2, 0.6, 0.3, 0.1)] == [None, 6, 6, None, 6, 6]
    study.close()
    study = open_study(home, _halving(make_spec, 1), data_digest="d")
    # After the first epoch the others had a tenth of their values: of seven trials two go on, of eight still two.
    assert [_told(study, value, EPOCHS) for value in (0.9, 0.55)] == [None, 1]
    assert _told(study, 0.95, EPOCHS) is None
    study.close()


@pytest.mark.parametrize(("name", "direction"), [("successive_halving", "maximize"), ("hyperband", "minimize")])
def test_our_halving_prunes_as_that_of_optuna(home, make_spec, name, direction):
    """300 trials with noisy curves, the same for both; ties included."""
    theirs = optuna.pruners.SuccessiveHalvingPruner(min_resource=2, reduction_factor=3)
    if name == "hyperband":
        theirs = optuna.pruners.HyperbandPruner(min_resource=2, max_resource=20, reduction_factor=3)
        ours = build_pruner(_halving(make_spec, 2, name, epochs=20))
    else:
        ours = Halving(first=2, factor=3)
    curves = np.random.default_rng(0).integers(0, 40, (300, 20)).astype(float)
    ends = []
    for pruner in (theirs, ours):
        study = optuna.create_study(study_name="same", direction=direction, pruner=pruner)
        ends.append([_verdict(study, curve) for curve in curves])
    assert ends[0] == ends[1]
    assert len(set(ends[0])) > 3


def _verdict(study, curve):
    trial = study.ask()
    for epoch, value in enumerate(curve, 1):
        trial.report(value, epoch)
        if trial.should_prune():
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            return epoch
    study.tell(trial, curve[-1])
    return None


def test_the_value_at_a_rung_is_the_first_one_from_there_on():
    assert rung_values({1: 0.1, 2: math.nan, 5: 0.5, 6: 0.6}, first=1, factor=2) == {1: 0.1, 4: 0.5}
    assert rung_values({}, first=1, factor=3) == {}


@pytest.mark.parametrize(("folds", "given", "ended"), [(5, None, 4), (5, 5, 5), (3, None, None)])
def test_whole_folds_end_a_trial_once_their_number_allows(make_spec, folds, given, ended):
    """All folds are worse: after n of them p is 1 / 2 ** n."""
    spec = make_spec(space=NUMERIC)
    pruner = spec.search.pruner.model_copy(update={"name": "wilcoxon", "startup_trials": given})
    split = spec.split.model_copy(update={"kind": "kfold", "folds": folds})
    search = spec.search.model_copy(update={"pruner": pruner})
    spec = type(spec).model_validate(spec.model_copy(update={"split": split, "search": search}).model_dump())
    study = optuna.create_study(direction="maximize", pruner=build_pruner(spec))
    assert _verdict(study, np.linspace(0.8, 0.9, folds)) is None
    assert _verdict(study, np.linspace(0.5, 0.55, folds)) == ended
    assert bool(pruner_warnings(spec)) == (ended is None or ended == folds)
