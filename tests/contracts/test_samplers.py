"""The contract of a sampler: every entry of the table keeps it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from formula import FINITE, MIXED, NUMERIC, objective, run_all, run_in_pieces, run_whole, sequence, train
from hpo.records import TrialResult, TrialState
from hpo.search.lifecycle import open_study
from hpo.search.samplers import SAMPLERS

SPACES = {"grid": FINITE, "cmaes": NUMERIC, "gp": NUMERIC}
STARTUP = {"gp": 8}  # a Gaussian process takes seconds


def other(home):
    root = home.root / "b"
    return replace(home, root=root, storage_url=f"sqlite:///{root / 'optuna.db'}")


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_study_in_pieces_tries_the_same_candidates_as_in_one_go(home, make_spec, sampler):
    spec = make_spec(sampler, space=SPACES.get(sampler, MIXED), startup=STARTUP.get(sampler, 3))
    expected = sequence(run_whole(home, spec, 11))
    result = run_in_pieces(other(home), spec, 11)
    assert result.count(TrialState.STOPPED) == 4
    assert sequence(result) == expected
    assert [ordinal for _, ordinal, *_ in expected] == list(range(11))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_another_seed_of_the_study_gives_other_candidates(home, make_spec, sampler):
    spec = make_spec(sampler, space=SPACES.get(sampler, MIXED))
    tried = [
        [parameters for *_, parameters, _ in sequence(run_whole(place, spec.model_copy(update={"seed": seed}), 4))]
        for place, seed in ((home, 1), (other(home), 2))
    ]
    assert tried[0] != tried[1]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_parameters_are_those_whose_conditions_hold(home, make_spec, sampler):
    result = run_whole(home, make_spec(sampler, space=FINITE), 12)
    candidates = [trial.candidate.parameters for trial in result.trials]
    assert {values["training.optimizer.name"] for values in candidates} == {"sgd", "adam"}
    for values in candidates:
        assert ("training.optimizer.momentum" in values) == (values["training.optimizer.name"] == "sgd")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_result_that_is_no_number_fails_its_trial_only(home, make_spec, sampler):
    study = open_study(home, make_spec(sampler, space=SPACES.get(sampler, MIXED), startup=1), data_digest="d")
    train(study, study.ask(budget=4, worker="w"), epochs=1)
    study.tell(TrialResult(study.ask(budget=4, worker="w").number, TrialState.COMPLETE, math.nan))
    run_all(study, 4)
    states = [trial.state for trial in study.result().trials]
    study.close()
    assert states == [TrialState.COMPLETE, TrialState.FAILED, TrialState.COMPLETE, TrialState.COMPLETE]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [name for name, entry in SAMPLERS.items() if entry.learns])
def test_a_sampler_that_learns_finds_better_candidates_in_time(home, make_spec, sampler):
    space = {"training.optimizer.lr": MIXED["training.optimizer.lr"]}
    result = run_whole(home, make_spec(sampler, space=space), 20)
    values = [objective(trial.candidate.parameters) for trial in result.trials]
    assert sum(values[12:]) / 8 > sum(values[:6]) / 6
