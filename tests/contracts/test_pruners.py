"""The contract of a pruner: every entry of the table keeps it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from formula import NUMERIC, run_in_pieces, run_whole, sequence, train
from hpo.records import Epoch, TrialResult, TrialState
from hpo.search.lifecycle import open_study
from hpo.search.pruners import PRUNERS, report_step
from hpo.spec.search import PrunerSpec


def other(home):
    root = home.root / "b"
    return replace(home, root=root, storage_url=f"sqlite:///{root / 'optuna.db'}")


def with_pruner(spec, name):
    search = spec.search.model_copy(update={"pruner": PrunerSpec.model_construct(name=name)})
    return spec.model_copy(update={"search": search})


def report_all(study, candidate, curve):
    """Whether the pruner would end the trial after any of nine epochs."""
    verdicts = [study.report(candidate.number, epoch, curve(epoch)) for epoch in range(1, 10)]
    return any(verdicts)


@pytest.mark.slow
@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_study_in_pieces_prunes_the_same_trials_as_in_one_go(home, make_spec, pruner):
    spec = make_spec("tpe", pruner, NUMERIC)
    # The same title keeps Hyperband's brackets.
    expected = sequence(run_whole(home, spec, 11, epochs=9))
    result = run_in_pieces(other(home), spec, 11, epochs=9)
    assert result.count(TrialState.STOPPED) == 4
    assert sequence(result) == expected


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_hopeless_trial_is_pruned_and_a_good_one_never(home, make_spec, pruner):
    study = open_study(home, make_spec(pruner=pruner), data_digest="d")
    for number in range(6):
        good = study.ask(budget=20, worker="w")
        assert not report_all(study, good, lambda epoch, lead=number / 1000: 0.9 + lead + epoch / 100)
        study.tell(TrialResult(good.number, TrialState.COMPLETE, 0.99 + number / 1000, 9))
    # Hyperband's brackets differ in patience: one of several hopeless trials falls into an eager one.
    pruned = []
    for _ in range(4):
        poor = study.ask(budget=20, worker="w")
        pruned.append(report_all(study, poor, lambda epoch: 0.3 - epoch / 100))
        study.tell(TrialResult(poor.number, TrialState.PRUNED, 0.29, 1))
    study.close()
    assert any(pruned) == (pruner != "none")


@pytest.mark.parametrize("pruner", PRUNERS)
def test_reports_of_no_number_are_recorded_and_the_study_goes_on(home, make_spec, pruner):
    study = open_study(home, make_spec("tpe", pruner, startup=1), data_digest="d")
    train(study, study.ask(budget=7, worker="w"))
    for value in (math.nan, math.inf, -math.inf):
        odd = study.ask(budget=7, worker="w")
        for epoch in range(1, 6):
            study.report(odd.number, epoch, value)
        study.tell(TrialResult(odd.number, TrialState.COMPLETE, value, 5))
        train(study, study.ask(budget=7, worker="w"))
    result = study.result()
    study.close()
    assert [trial.state is TrialState.FAILED for trial in result.trials] == [False, True] * 3 + [False]
    assert all("not a finite number" in result.trials[number].result.reason for number in (1, 3, 5))


def folds(make_spec, pruner):
    """What is reported after each epoch of two folds of three epochs, for a study with this pruner."""
    spec = make_spec(pruner=pruner, epochs=3)
    setup = spec.setup.model_copy(update={"split": spec.split.model_copy(update={"kind": "kfold"})})
    values = [[0.1, 0.3, 0.2], [0.4, 0.6, 0.5]]
    epochs = [
        Epoch(number, {"valid_accuracy": value, "valid_loss": 1 - value}, 0.1, 0.1, fold=fold, last=number == 3)
        for fold, curve in enumerate(values)
        for number, value in enumerate(curve, 1)
    ]
    return [report_step(spec, setup, epochs[:count]) for count in range(1, 7)]


@pytest.mark.parametrize("pruner", PRUNERS)
def test_epochs_of_several_folds_are_reported_as_the_table_says(make_spec, pruner):
    first = [(1, 0.1), (2, 0.3), (3, 0.2)]
    expected = {
        "every_epoch": [*first, (4, 0.4), (5, 0.6), (6, 0.5)],
        "first_fold": [*first, None, None, None],
        "whole_folds": [None, None, (1, 0.3), None, None, (2, 0.6)],
    }
    assert folds(make_spec, pruner) == expected[PRUNERS[pruner].reports]
