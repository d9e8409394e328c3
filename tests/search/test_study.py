from __future__ import annotations

import multiprocessing
import random

import optuna
import pytest

from formula import FINITE, FINITE_CELLS, NUMERIC, run_all, train
from hpo.errors import SpecError
from hpo.records import TrialResult, TrialState
from hpo.search.lifecycle import open_study
from hpo.storage.reader import read_study
from hpo.storage.trial_attrs import key_of

FORK = multiprocessing.get_context("fork")


def test_candidate_holds_real_values_and_only_active_parameters(home, make_spec):
    space = {**FINITE, "data.size": {"choice": [None, 28]}}
    study = open_study(home, make_spec("random", space=space), data_digest="d")
    seen = [study.ask(budget=30, worker="w").parameters for _ in range(30)]
    stored = [trial.candidate.parameters for trial in study.result().trials]
    study.close()
    assert stored == seen
    assert {str(values["model.hidden"]) for values in seen} == {"32", "[64, 32]", "[]"}
    assert {values["data.size"] for values in seen} == {None, 28}
    for values in seen:
        assert ("training.optimizer.momentum" in values) == (values["training.optimizer.name"] == "sgd")


def test_seed_of_the_spec_or_the_space_outranks_the_trial_own(home, make_spec):
    spec = make_spec(space={"training.seed": {"choice": [5]}, **NUMERIC})
    study = open_study(home, spec, data_digest="d")
    assert study.ask(budget=1, worker="w").seed == 5
    study.close()


def test_candidate_of_a_grid_is_not_lost_where_its_retry_is_killed_while_it_is_taken_up(home, make_spec, monkeypatch):
    study = open_study(home, make_spec("grid", space=FINITE), data_digest="d")
    first = study.ask(budget=100, worker="w")
    study.tell(TrialResult(first.number, TrialState.STOPPED))
    suggest, names = optuna.Trial._suggest, []

    def killed(trial, name, found):
        names.append(name)
        if len(names) > 1:
            raise KeyboardInterrupt
        return suggest(trial, name, found)

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Trial, "_suggest", killed)
        with pytest.raises(KeyboardInterrupt):
            study.ask(budget=100, worker="w")
    study.close()
    study = open_study(home, make_spec("grid", space=FINITE), data_digest="d")
    assert study.reap() == [first.number + 1]
    again = study.ask(budget=100, worker="w")
    study.close()
    assert (again.parameters, again.ordinal, again.attempt) == (first.parameters, first.ordinal, 3)


@pytest.mark.slow
def test_candidate_whose_process_dies_three_times_is_failed_but_ctrl_c_is_no_death(home, make_spec):
    for _ in range(4):
        study = open_study(home, make_spec(), data_digest="d")
        study.tell(TrialResult(study.ask(budget=1, worker="w").number, TrialState.STOPPED))
        study.close()
    for _ in range(3):
        study = open_study(home, make_spec(), data_digest="d")
        study.reap()
        study.ask(budget=1, worker="w")
        study.close()
    study = open_study(home, make_spec(), data_digest="d")
    study.reap()
    last = study.result().trials[-1]
    assert study.ask(budget=1, worker="w") is None
    study.close()
    assert last.state is TrialState.FAILED
    assert "interrupted 3 times" in last.result.reason


def test_grid_gives_every_cell_once_over_workers_restarts_and_failures(home, make_spec):
    chance = random.Random(1)  # noqa: S311
    spec = make_spec("grid", space=FINITE)
    handles, running, exhausted = [], [], False
    while not exhausted:
        handles = handles or [open_study(home, spec, data_digest="d") for _ in range(2)]
        handles[0].reap()
        study = chance.choice(handles)
        if candidate := study.ask(budget=1000, worker="w"):
            running.append((study, candidate))
        exhausted = study.exhausted and not running
        if running and chance.random() < 0.6:
            study, candidate = running.pop(chance.randrange(len(running)))
            state = chance.choice([TrialState.COMPLETE, TrialState.FAILED, TrialState.STOPPED])
            study.tell(TrialResult(candidate.number, state, 0.5 if state is TrialState.COMPLETE else None))
        if chance.random() < 0.1:
            for study in handles:
                study.close()
            handles, running = [], []
    result = handles[0].result()
    for study in handles:
        study.close()
    done = [str(sorted(trial.candidate.parameters.items())) for trial in result.trials if trial.state.finished]
    assert len(done) == len(set(done)) == FINITE_CELLS
    assert result.count(TrialState.RUNNING, TrialState.WAITING) == 0
    assert result.count(TrialState.STOPPED) > 0


def test_grid_that_grew_runs_its_new_cells_only(home, make_spec):
    small = make_spec("grid", space={"model.dropout": {"float": [0, 0.2], "step": 0.1}})
    study = open_study(home, small, data_digest="d")
    run_all(study, 100)
    study.close()
    large = make_spec("grid", space={"model.dropout": {"float": [0, 0.4], "step": 0.1}})
    study = open_study(home, large, data_digest="d")
    run_all(study, 100)
    values = [trial.candidate.parameters["model.dropout"] for trial in study.result().trials]
    study.close()
    assert sorted(values[:3]) == pytest.approx([0, 0.1, 0.2])
    assert sorted(values[3:]) == pytest.approx([0.3, 0.4])


@pytest.mark.parametrize("sampler", ["random", "tpe", "qmc"])
def test_running_workers_have_different_candidates_of_a_finite_space(home, make_spec, sampler):
    study = open_study(home, make_spec(sampler, space={"model.hidden": {"choice": [8, 16, 32, 64]}}), data_digest="d")
    run_all(study, 4)
    running = [study.ask(budget=7, worker="w").parameters["model.hidden"] for _ in range(3)]
    study.close()
    assert len(set(running)) == 3


def test_resume_with_another_experiment_names_every_difference(home, make_spec):
    open_study(home, make_spec(epochs=20), data_digest="d").close()
    with pytest.raises(SpecError, match=r"training\.epochs: 20 -> 5.*data digest: d -> e") as caught:
        open_study(home, make_spec(epochs=5), data_digest="e")
    assert "--fresh" in caught.value.hint


def test_sampler_and_pruner_may_change_on_resume_and_a_changed_space_must_be_wanted(home, make_spec):
    study = open_study(home, make_spec("random", space=FINITE), data_digest="d")
    run_all(study, 3)
    study.close()
    wider = {**FINITE, "model.dropout": {"float": [0, 0.9]}}
    study = open_study(home, make_spec("tpe", "median", wider), data_digest="d", extend=True)
    run_all(study, 6)
    result = study.result()
    study.close()
    assert result.spec["search"]["sampler"]["name"] == "tpe"
    assert "model.dropout" in result.trials[5].candidate.parameters
    with pytest.raises(SpecError, match=r"hidden: new choices \[64\] and without .* no longer searched") as caught:
        open_study(home, make_spec(space={"model.hidden": {"choice": [32, 64]}}), data_digest="d")
    assert "--extend" in caught.value.hint
    assert "--fresh" in caught.value.hint


def test_fresh_starts_the_next_generation_and_a_resume_continues_the_newest(home, make_spec):
    titles = []
    for fresh in (False, True, True, False):
        study = open_study(home, make_spec(epochs=4 + fresh), data_digest="d", fresh=fresh) if fresh else None
        study = study or open_study(home, make_spec(epochs=4 + bool(titles)), data_digest="d")
        run_all(study, len(titles) + 1)
        titles.append(study.title)
        study.close()
    assert titles == ["study", "study~2", "study~3", "study~3"]
    assert len(read_study(home, "study").trials) == 4
    assert len(read_study(home, "study~2").trials) == 2


def test_last_cell_of_a_grid_is_kept_for_a_candidate_that_died_before_it_was_drawn(home, make_spec, monkeypatch):
    study = open_study(home, make_spec("grid", space=FINITE), data_digest="d")
    for _ in range(FINITE_CELLS - 1):
        train(study, study.ask(budget=100, worker="w"), epochs=1)

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(study._starter, "_suggest", killed)
    with pytest.raises(KeyboardInterrupt):
        study.ask(budget=100, worker="w")
    study.close()
    other = open_study(home, make_spec("grid", space=FINITE), data_digest="d")
    assert other.ask(budget=100, worker="w") is None
    assert other.blocked
    assert len(other.reap()) == 1
    run_all(other)
    keys = [key_of(trial.candidate.parameters) for trial in other.result().trials if trial.state.finished]
    other.close()
    assert len(keys) == len(set(keys)) == FINITE_CELLS
