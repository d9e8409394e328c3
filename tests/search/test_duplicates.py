from __future__ import annotations

from dataclasses import replace

import pytest

from formula import FINITE, FINITE_CELLS, objective, run_all, sequence, train
from hpo.records import Epoch, TrialResult, TrialState
from hpo.search.lifecycle import open_study
from hpo.storage.trial_attrs import key_of

SIZES = {"model.hidden": {"choice": [8, 16, 32]}}


def keys(result):
    return [key_of(trial.candidate.parameters) for trial in result.trials if trial.state.finished]


def test_reused_candidate_has_the_earlier_result_at_once_and_trains_nothing(home, make_spec):
    study = open_study(home, make_spec("random", space=SIZES, duplicates="reuse"), data_digest="d")
    trained = {}
    while candidate := study.ask(budget=30, worker="w"):
        assert candidate.parameters["model.hidden"] not in trained
        trained[candidate.parameters["model.hidden"]] = candidate.number
        value = candidate.parameters["model.hidden"] / 100
        epoch = Epoch(1, {"valid_accuracy": value}, 0.1, 1.0)
        study.tell(
            TrialResult(candidate.number, TrialState.COMPLETE, value, 1, (epoch,), epoch.scores, 1.0, folder="f")
        )
    assert study.exhausted
    result, taken = study.result(), study.take_reused()
    assert study.take_reused() == []
    study.close()
    assert len(trained) == 3
    reused = [trial for trial in result.trials if trial.number not in trained.values()]
    assert [(trial.candidate, trial.result) for trial in reused] == taken
    for trial in reused:
        size = trial.candidate.parameters["model.hidden"]
        assert trial.value == size / 100
        assert trial.result.scores == {"valid_accuracy": size / 100}
        assert trial.result.reason == f"same candidate as trial {trained[size]}"
        assert (trial.result.epochs, trial.result.seconds, trial.result.folder) == ((), 0.0, "")


def test_reuse_counts_against_the_budget_and_pruned_or_failed_candidates_are_trained_again(home, make_spec):
    study = open_study(home, make_spec("random", space={**SIZES, **FINITE}, duplicates="reuse"), data_digest="d")
    states = [TrialState.PRUNED, TrialState.FAILED, TrialState.COMPLETE]
    asked = []
    while candidate := study.ask(budget=12, worker="w"):
        asked.append(candidate)
        state = states[len(asked) % 3]
        study.tell(TrialResult(candidate.number, state, 0.5 if state is TrialState.COMPLETE else None, 1))
    result = study.result()
    study.close()
    assert len(result.trials) == 12
    complete = {key_of(one.parameters): one.number for index, one in enumerate(asked) if (index + 1) % 3 == 2}
    for candidate in asked:
        assert complete.get(key_of(candidate.parameters), candidate.number) >= candidate.number


def test_reuse_goes_on_after_a_kill_while_it_answers(home, make_spec, monkeypatch):
    spec = make_spec("random", space=SIZES, duplicates="reuse")
    study = open_study(home, spec, data_digest="d")
    for _ in range(2):
        train(study, study.ask(budget=30, worker="w"), epochs=1)

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "tell", killed)

    def go_on():
        while candidate := study.ask(budget=30, worker="w"):
            study._finisher.finish(
                study._trials()[candidate.number], TrialResult(candidate.number, TrialState.COMPLETE, 0.5)
            )

    with pytest.raises(KeyboardInterrupt):
        go_on()
    study.close()
    study = open_study(home, spec, data_digest="d")
    study.reap()
    run_all(study, 30)
    result = study.result()
    study.close()
    assert len(set(keys(result))) == 3
    assert result.count(TrialState.RUNNING, TrialState.WAITING) == 0
    trained = [trial for trial in result.trials if trial.state is TrialState.COMPLETE and not trial.result.reason]
    assert len(trained) == 3


LONGER = [pytest.param(name, marks=pytest.mark.slow) for name in ("tpe", "qmc")]


@pytest.mark.parametrize("sampler", ["random", "grid", *LONGER])
def test_rejecting_search_never_repeats_a_candidate_and_ends_when_all_are_tried(home, make_spec, sampler):
    spec = make_spec(sampler, space=FINITE, duplicates="reject")
    study = open_study(home, spec, data_digest="d")
    held = study.ask(budget=1000, worker="w")
    run_all(study)
    assert study.exhausted
    study.tell(TrialResult(held.number, TrialState.COMPLETE, objective(held.parameters), 1))
    result = study.result()
    study.close()
    assert len(result.trials) == len(set(keys(result))) == FINITE_CELLS


def test_rejecting_search_with_priors_repeats_nothing_and_ends_when_all_are_tried(home, make_spec):
    prior = {"value": "sgd", "confidence": "high"}
    space = {**FINITE, "training.optimizer.name": {**FINITE["training.optimizer.name"], "prior": prior}}
    space["model.hidden"] = {**FINITE["model.hidden"], "prior": {"value": 32, "confidence": "high"}}
    study = open_study(home, make_spec("random", space=space, duplicates="reject"), data_digest="d")
    run_all(study, worth=lambda values: float(values["model.hidden"] == 32))
    assert study.exhausted
    result = study.result()
    study.close()
    assert len(result.trials) == len(set(keys(result))) == FINITE_CELLS


@pytest.mark.slow
def test_rejecting_search_in_pieces_tries_the_same_candidates_as_in_one_go(home, make_spec):
    spec = make_spec("tpe", space=FINITE, duplicates="reject")
    whole = open_study(home, spec, data_digest="d")
    run_all(whole)
    expected = sequence(whole.result())
    whole.close()
    other = replace(home, root=home.root / "b", storage_url=f"sqlite:///{home.root / 'b' / 'optuna.db'}")
    for _ in range(4):
        study = open_study(other, spec, data_digest="d")
        study.reap()
        for _ in range(2):
            train(study, study.ask(budget=100, worker="w"), epochs=1)
        study.ask(budget=100, worker="w")
        study.close()
    study = open_study(other, spec, data_digest="d")
    study.reap()
    run_all(study)
    assert sequence(study.result()) == expected
    study.close()


def test_kill_between_drawing_and_signing_draws_the_same_again(home, make_spec, monkeypatch):
    spec = make_spec("random", space=FINITE, duplicates="reject")
    study = open_study(home, spec, data_digest="d")
    expected = study.ask(budget=9, worker="w").parameters
    study.close()
    study = open_study(home, spec, data_digest="d", fresh=True)

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(study._starter, "_sign", killed)
    with pytest.raises(KeyboardInterrupt):
        study.ask(budget=9, worker="w")
    study.close()
    study = open_study(home, spec, data_digest="d")
    study.reap()
    again = study.ask(budget=9, worker="w")
    study.close()
    assert (again.parameters, again.ordinal) == (expected, 0)


def test_reseeding_search_trains_a_duplicate_with_its_own_seed(home, make_spec):
    study = open_study(home, make_spec("random", space=SIZES), data_digest="d")
    run_all(study, 8)
    result = study.result()
    study.close()
    assert not study.exhausted
    assert len(set(keys(result))) < len({trial.candidate.seed for trial in result.trials}) == 8


def test_duplicates_of_different_stages_are_none(home, make_spec):
    stages = [{"name": "one", "space": SIZES}, {"name": "two", "space": SIZES}]
    study = open_study(home, make_spec(space={}, stages=stages, duplicates="reuse"), data_digest="d")
    run_all(study)
    assert study.take_reused() == []
    assert len(study.result().trials) == 6
    study.close()
