from __future__ import annotations

import math

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formula import NUMERIC, train
from hpo.errors import SpecError
from hpo.records import FINAL, Candidate, StudyResult, Trial, TrialResult, TrialState
from hpo.search.constraints import aims, judge, most_parameters, needs_latency, parse_constraint, violation
from hpo.search.lifecycle import open_study

LR = {"training.optimizer.lr": NUMERIC["training.optimizer.lr"]}
WIDTH = {"model.hidden": {"int": [1, 1000]}}


def test_constraint_is_read_and_its_violation_is_a_share_of_the_limit():
    limit = parse_constraint(" parameters<=2e5 ")
    assert limit == ("parameters", "<=", 200000.0)
    assert violation(limit, {"parameters": 300000}) == 0.5
    assert violation(limit, {"parameters": 200000}) == 0
    assert violation(parse_constraint("valid_accuracy >= 0.9"), {"valid_accuracy": 0.45}) == 0.5
    assert violation(parse_constraint("valid_loss <= 0"), {"valid_loss": 0.1}) == 0.1
    assert violation(limit, {}) == violation(limit, {"parameters": math.nan}) == math.inf


@pytest.mark.parametrize("text", ["parameters < 3", "parameters <= many", "parameters <=", "<= 3", "parameters <= 1e"])
def test_unreadable_constraint_says_how_to_write_one(text):
    with pytest.raises(SpecError, match="is no limit") as caught:
        parse_constraint(text)
    assert "parameters <= 200000" in caught.value.hint


def test_judge_fills_in_values_and_feasibility_from_scores(make_spec):
    spec = make_spec(objectives=["valid_accuracy", "parameters"], constraints=["parameters <= 100", "latency_ms <= 2"])
    scores = {"valid_accuracy": 0.8, "parameters": 90.0, "latency_ms": 1.0}
    judged = judge(spec, TrialResult(0, TrialState.COMPLETE, scores=scores))
    assert (judged.value, judged.values, judged.feasible) == (0.8, (0.8, 90.0), True)
    assert not judge(spec, TrialResult(0, TrialState.COMPLETE, scores={**scores, "latency_ms": 3.0})).feasible
    assert not judge(spec, TrialResult(0, TrialState.COMPLETE, scores={"parameters": 90.0})).feasible
    assert aims(spec) == (("valid_accuracy", "maximize"), ("parameters", "minimize"))
    assert (most_parameters(spec), needs_latency(spec)) == (100, True)
    plain = make_spec(objective="valid_loss")
    assert judge(plain, TrialResult(0, TrialState.COMPLETE, 0.3)) == TrialResult(0, TrialState.COMPLETE, 0.3)
    assert (aims(plain), most_parameters(plain), needs_latency(plain)) == (
        (("valid_loss", "minimize"),),
        math.inf,
        False,
    )


def test_training_without_validation_is_not_judged_by_validation_limits(make_spec):
    spec = make_spec(constraints=["valid_accuracy >= 0.9", "parameters <= 100"])
    assert judge(spec, TrialResult(0, TrialState.COMPLETE, 0.95, scores={"parameters": 90.0})).feasible
    assert not judge(spec, TrialResult(0, TrialState.PRUNED, scores={"parameters": 190.0})).feasible


@pytest.mark.parametrize(("sampler", "limited"), [("tpe", False), ("tpe", True), ("gp", True)])
def test_sampler_learns_where_the_limit_is_kept_and_an_infeasible_trial_is_never_best(
    home, make_spec, sampler, limited
):
    limits = ["parameters <= 3000"] if limited else []
    spec = make_spec(sampler, space=WIDTH, constraints=limits, startup=6)
    study = open_study(home, spec, data_digest="d")
    while candidate := study.ask(budget=16, worker="w"):
        width = candidate.parameters["model.hidden"]
        scores = {"valid_accuracy": width / 1000, "parameters": 10.0 * width}
        study.tell(judge(spec, TrialResult(candidate.number, TrialState.COMPLETE, width / 1000, 1, scores=scores)))
    result = study.result()
    study.close()
    widths = [trial.candidate.parameters["model.hidden"] for trial in result.trials]
    kept = [width for width in widths if width <= 300 or not limited]
    assert [trial.value for trial in result.trials] == [width / 1000 for width in widths]
    assert [trial.candidate.parameters["model.hidden"] for trial in result.ranked()] == sorted(kept)[::-1]
    # More width is better: without the limit small ones are left alone.
    small = sum(width <= 300 for width in widths[6:])
    assert small >= 4 if limited else small == 0


def test_network_that_is_too_large_is_pruned_untrained_and_the_sampler_knows_why(home, make_spec):
    spec = make_spec("tpe", space=WIDTH, constraints=["parameters <= 3000"], startup=2)
    study = open_study(home, spec, data_digest="d")
    for _ in range(6):
        candidate = study.ask(budget=6, worker="w")
        scores = {"parameters": 10.0 * candidate.parameters["model.hidden"]}
        state = TrialState.COMPLETE if scores["parameters"] <= 3000 else TrialState.PRUNED
        study.tell(judge(spec, TrialResult(candidate.number, state, 0.5, scores=scores)))
    trials = [study._storage.every_trial(study._id)[number] for number in range(6)]
    assert [trial.constraints["parameters <= 3000"] > 0 for trial in trials] == [
        trial.params["model.hidden"] > 300 for trial in trials
    ]
    study.close()


def test_changed_constraints_are_another_experiment(home, make_spec):
    open_study(home, make_spec(constraints=["parameters <= 100"]), data_digest="d").close()
    open_study(home, make_spec(constraints=["parameters <= 100"]), data_digest="d").close()
    with pytest.raises(SpecError, match=r"constraints: \['parameters <= 100'\] -> absent"):
        open_study(home, make_spec(), data_digest="d")


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp", "qmc"])
def test_several_objectives_are_all_told_and_the_front_is_kept(home, make_spec, sampler):
    spec = make_spec(sampler, space={**WIDTH, **LR}, objectives=["valid_accuracy", "parameters"], startup=4)
    study = open_study(home, spec, data_digest="d")
    while candidate := study.ask(budget=6, worker="w"):
        width, lr = candidate.parameters["model.hidden"], candidate.parameters["training.optimizer.lr"]
        scores = {"valid_accuracy": width / 1000 - lr, "parameters": float(width)}
        assert not study.report(candidate.number, 1, 0.5)
        study.tell(judge(spec, TrialResult(candidate.number, TrialState.COMPLETE, scores=scores)))
    told = [trial.values for trial in study._storage.every_trial(study._id)]
    result = study.result()
    front = {trial.number for trial in optuna.load_study(study_name=study.title, storage=home.storage_url).best_trials}
    study.close()
    assert told == [list(trial.result.values) for trial in result.trials]
    assert (result.objective, result.direction) == ("valid_accuracy", "maximize")
    assert result.objectives == aims(spec)
    assert {trial.number for trial in result.pareto()} == front
    assert result.pareto()[0] == result.best


def test_objective_that_is_missing_fails_the_trial_by_name(home, make_spec):
    spec = make_spec(objectives=["valid_accuracy", "latency_ms"])
    study = open_study(home, spec, data_digest="d")
    number = study.ask(budget=3, worker="w").number
    study.tell(judge(spec, TrialResult(number, TrialState.COMPLETE, scores={"valid_accuracy": 0.5})))
    final = study.enqueue_finals([({}, 1)]) or study.ask_final(worker="w")
    study.tell(judge(spec, TrialResult(final.number, TrialState.COMPLETE, 0.7)))
    first, last = study.result().trials
    study.close()
    assert first.state is TrialState.FAILED
    assert "latency_ms is nan" in first.result.reason
    assert (last.candidate.stage, last.state, last.value) == (FINAL, TrialState.COMPLETE, 0.7)


def test_sampler_for_one_objective_is_refused_for_several(home, make_spec):
    with pytest.raises(SpecError, match="cmaes searches for one objective"):
        open_study(home, make_spec("cmaes", objectives=["valid_accuracy", "parameters"]), data_digest="d")


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.booleans()), max_size=12))
def test_front_holds_exactly_the_feasible_trials_that_none_dominates(points):
    trials = tuple(
        Trial(
            Candidate(number, number, {}, 0),
            TrialState.COMPLETE,
            TrialResult(number, TrialState.COMPLETE, good, values=(good, cost), feasible=feasible),
        )
        for number, (good, cost, feasible) in enumerate(points)
    )
    objectives = (("valid_accuracy", "maximize"), ("parameters", "minimize"))
    study = StudyResult("s", 1, "maximize", "valid_accuracy", trials, objectives=objectives)
    feasible = [(number, good, cost) for number, (good, cost, kept) in enumerate(points) if kept]
    expected = {
        number
        for number, good, cost in feasible
        if not any((g >= good and c <= cost) and (g > good or c < cost) for _, g, c in feasible)
    }
    assert {trial.number for trial in study.pareto()} == expected


def test_front_of_one_objective_is_its_best(home, make_spec):
    study = open_study(home, make_spec(), data_digest="d")
    while candidate := study.ask(budget=5, worker="w"):
        train(study, candidate)
    result = study.result()
    study.close()
    assert result.pareto() == [result.best]
