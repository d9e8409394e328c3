from __future__ import annotations

from dataclasses import replace

import pytest

from formula import FINITE, MIXED, NUMERIC, objective, run_all, sequence, train
from hpo.records import FINAL, TrialResult, TrialState
from hpo.search.lifecycle import open_study

BUDGET = 8


def finish(study, budget=BUDGET):
    """Search, then train the two best with two seeds each."""
    run_all(study, budget)
    best = study.result().ranked()[:2]
    study.enqueue_finals([(trial.candidate.parameters, seed) for trial in best for seed in (11, 12)])
    while candidate := study.ask_final(worker="w"):
        study.tell(TrialResult(candidate.number, TrialState.COMPLETE, 5 + objective(candidate.parameters), 1))


def finals(result):
    trials = [trial for trial in result.trials if trial.candidate.stage == FINAL]
    return [(trial.candidate.parameters, trial.candidate.seed) for trial in trials if trial.state.finished]


def test_finals_have_the_given_parameters_and_seeds_and_no_budget(home, make_spec):
    study = open_study(home, make_spec(), data_digest="d")
    finish(study)
    result = study.result()
    assert study.ask(budget=BUDGET, worker="w") is None
    assert study.counted() == len(result.counted) == BUDGET
    study.close()
    best = [trial.candidate.parameters for trial in result.ranked()[:2]]
    assert finals(result) == [(parameters, seed) for parameters in best for seed in (11, 12)]
    assert result.best.candidate.stage is None
    assert [trial.candidate.parameters for trial in result.ranked(FINAL)[::2]] == best


LONGER = [pytest.param(name, marks=pytest.mark.slow) for name in ("cmaes", "qmc")]


@pytest.mark.parametrize("sampler", ["tpe", "grid", *LONGER])
def test_search_goes_on_after_finals_as_if_there_were_none(home, make_spec, sampler):
    spec = make_spec(sampler, "median", FINITE if sampler == "grid" else NUMERIC, startup=6)
    plain = open_study(home, spec, data_digest="d")
    run_all(plain, BUDGET + 3)
    expected = sequence(plain.result())
    plain.close()
    other = replace(home, root=home.root / "b", storage_url=f"sqlite:///{home.root / 'b' / 'optuna.db'}")
    for budget in (BUDGET, BUDGET + 3):
        study = open_study(other, spec, data_digest="d")
        finish(study, budget)
        result = study.result()
        study.close()
    assert sequence(result) == expected
    assert len(result.trials) > BUDGET + 3


def test_enqueueing_finals_again_adds_only_what_is_missing(home, make_spec, monkeypatch):
    spec = make_spec()
    study = open_study(home, spec, data_digest="d")
    run_all(study, BUDGET)
    wanted = [(trial.candidate.parameters, seed) for trial in study.result().ranked()[:2] for seed in (1, 2)]
    add, left = study._finisher.enqueue, [2]

    def killed(trial):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        add(trial)

    monkeypatch.setattr(study._finisher, "enqueue", killed)
    with pytest.raises(KeyboardInterrupt):
        study.enqueue_finals(wanted)
    study.close()
    study = open_study(home, spec, data_digest="d")
    for _ in range(3):
        study.enqueue_finals(wanted)
    asked = []
    while candidate := study.ask_final(worker="w"):
        asked.append((candidate.parameters, candidate.seed))
        study.enqueue_finals(wanted)
        study.tell(TrialResult(candidate.number, TrialState.COMPLETE, 0.5, 1))
        study.enqueue_finals(wanted)
    study.close()
    assert asked == wanted


WANTED = [({"model.dropout": 0.1}, 7)]


def told_finals(home, spec, wanted=WANTED):
    """The settings of the final trainings that are handed out now; each is told."""
    study, handed = open_study(home, spec, data_digest="d"), []
    study.enqueue_finals(wanted)
    while candidate := study.ask_final(worker="w"):
        handed.append(candidate.final)
        study.tell(TrialResult(candidate.number, TrialState.COMPLETE, 0.5, 1))
    study.close()
    return handed


def test_other_settings_of_final_are_enqueued_and_those_that_were_trained_are_not(home, make_spec):
    long, longer = {"set": {"training.epochs": 60}}, {"set": {"training.epochs": 200}}
    every = {"on": "all", "split": {"kind": "holdout"}}
    for final in (long, longer, every, {"split": {"kind": "holdout", "seed": 1}}, {"teacher": "models:/m-1"}):
        handed = told_finals(home, make_spec(final={**final, "seeds": 2}))
        assert handed == [{"on": "all"} if final is every else final]
    for final in (long, {**long, "finalists": 2}, {"on": "all"}, {"set": {**long["set"], "training.checkpoint": 5}}):
        assert told_finals(home, make_spec(final=final)) == []


def test_a_final_that_waits_with_earlier_settings_ends_and_can_be_asked_for_again(home, make_spec):
    short, long = ({"set": {"training.epochs": epochs}} for epochs in (10, 200))
    study = open_study(home, make_spec(final=long), data_digest="d")
    study.enqueue_finals(WANTED)
    study.tell(TrialResult(study.ask_final(worker="w").number, TrialState.STOPPED))
    study.close()
    assert told_finals(home, make_spec(final=short)) == [short]
    assert told_finals(home, make_spec(final=long)) == [long]
    study = open_study(home, make_spec(final=long), data_digest="d")
    states = [trial.state for trial in study.result().trials]
    assert states == [TrialState.STOPPED, TrialState.STOPPED, TrialState.COMPLETE, TrialState.COMPLETE]
    study.close()


def test_a_final_without_recorded_settings_has_those_of_the_spec(home, make_spec):
    # Earlier versions recorded none.
    plain = open_study(home, make_spec(), data_digest="d")
    plain.enqueue_finals(WANTED)
    plain.tell(TrialResult(plain.ask_final(worker="w").number, TrialState.COMPLETE, 0.5, 1))
    plain.enqueue_finals([(WANTED[0][0], 8)])
    plain.close()
    final = {"set": {"training.epochs": 60}}
    assert told_finals(home, make_spec(final=final), [*WANTED, (WANTED[0][0], 8)]) == [final]


def test_search_never_hands_out_finals_nor_finals_the_search(home, make_spec):
    study = open_study(home, make_spec(), data_digest="d")
    study.enqueue_finals([({"model.dropout": 0.1}, 7)])
    candidate = study.ask(budget=3, worker="w")
    assert (candidate.stage, candidate.ordinal) == (None, 0)
    study.tell(TrialResult(candidate.number, TrialState.STOPPED))
    final = study.ask_final(worker="w")
    assert (final.stage, final.ordinal, final.seed, final.parameters) == (FINAL, 0, 7, {"model.dropout": 0.1})
    assert study.ask_final(worker="w") is None
    assert study.blocked
    assert study.ask(budget=3, worker="w").attempt == 2
    study.close()


def test_interrupted_final_is_handed_out_again(home, make_spec):
    study = open_study(home, make_spec(), data_digest="d")
    study.enqueue_finals([({"model.dropout": 0.1}, 7)])
    study.ask_final(worker="w")
    study.close()
    study = open_study(home, make_spec(), data_digest="d")
    assert len(study.reap()) == 1
    again = study.ask_final(worker="w")
    assert (again.attempt, again.ordinal, again.seed, again.parameters) == (2, 0, 7, {"model.dropout": 0.1})
    study.tell(TrialResult(again.number, TrialState.COMPLETE, 0.5, 1))
    assert study.ask_final(worker="w") is None
    assert not study.blocked
    study.close()


@pytest.mark.parametrize("pruner", ["median", "patient", "successive_halving"])
def test_final_is_never_pruned(home, make_spec, pruner):
    study = open_study(home, make_spec(pruner=pruner), data_digest="d")
    run_all(study, 4, epochs=9)
    study.enqueue_finals([({"model.dropout": 0.1}, 7)])
    final = study.ask_final(worker="w")
    assert not any(study.report(final.number, epoch, -epoch) for epoch in range(1, 10))
    study.close()


def test_finals_wait_for_results_that_are_still_to_come(home, make_spec):
    one, two = (open_study(home, make_spec(final={"seeds": 2}), data_digest="d") for _ in range(2))
    first, second = one.ask(budget=2, worker="w"), two.ask(budget=2, worker="w")
    train(one, first)
    assert one.ask(budget=2, worker="w") is None
    assert one.blocked
    train(two, second)
    assert one.ask(budget=2, worker="w") is None
    assert not one.blocked
    one.close()
    two.close()


@pytest.mark.parametrize(("sampler", "space"), [("random", MIXED), ("grid", FINITE)])
def test_failed_candidates_run_again_on_request_and_count_once(home, make_spec, sampler, space):
    study = open_study(home, make_spec(sampler, space=space), data_digest="d")
    for place in range(6):
        candidate = study.ask(budget=6, worker="w")
        state = TrialState.FAILED if place in (1, 4) else TrialState.COMPLETE
        study.tell(TrialResult(candidate.number, state, None if place in (1, 4) else 0.5, 1))
    assert study.ask(budget=6, worker="w") is None
    study.enqueue_finals([({"model.dropout": 0.1}, 7)])
    study.tell(TrialResult(study.ask_final(worker="w").number, TrialState.FAILED))
    failed = [trial.candidate for trial in study.result().trials if trial.state is TrialState.FAILED]
    assert study.retry_failed() == 3
    assert study.retry_failed() == 0
    assert study.counted() == 6
    again = [study.ask(budget=6, worker="w") for _ in range(2)]
    assert study.ask(budget=6, worker="w") is None
    again.append(study.ask_final(worker="w"))
    assert [replace(one, number=0, attempt=1) for one in again] == [replace(one, number=0) for one in failed]
    study.tell(TrialResult(again[0].number, TrialState.FAILED))
    study.tell(TrialResult(again[1].number, TrialState.COMPLETE, 0.5))
    study.tell(TrialResult(again[2].number, TrialState.COMPLETE, 0.5))
    assert study.retry_failed() == 1
    result = study.result()
    study.close()
    assert len(result.counted) == 6
    assert sorted(trial.candidate.ordinal for trial in result.counted) == list(range(6))
