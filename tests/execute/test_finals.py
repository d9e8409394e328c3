"""Who is trained again after the search, with what, and who wins."""

import numpy as np
import pytest

from formula_study import CARD, formula_spec
from hpo.execute.finals import final_setup, finalists, race, with_final
from hpo.records import FINAL, Candidate, StudyResult, Trial, TrialResult, TrialState, pack_classes, unpack_classes
from hpo.report.statistics import paired_bootstrap
from hpo.spec.study import FinalSpec, SplitSpec


def _spec(**final):
    return formula_spec().model_copy(update={"final": FinalSpec(**final)})


def _trial(number, dropout, value, *, stage=None, seed=0, predicted=(), best_epoch=2, final=None):
    result = TrialResult(number, TrialState.COMPLETE, value, best_epoch, predicted=pack_classes(predicted))
    candidate = Candidate(number, number, {"model.dropout": dropout}, seed, stage=stage, final=final)
    return Trial(candidate, TrialState.COMPLETE, result)


def _study(*trials):
    return StudyResult("formula", 1, "maximize", "valid_accuracy", trials)


def test_the_best_different_candidates_run_with_every_fresh_seed():
    spec = _spec(finalists=2, seeds=3)
    study = _study(_trial(0, 0.1, 0.5), _trial(1, 0.2, 0.9), _trial(2, 0.2, 0.8), _trial(3, 0.3, 0.7))
    chosen = finalists(spec, study)
    assert [parameters["model.dropout"] for parameters, _ in chosen] == [0.2] * 3 + [0.3] * 3
    seeds = [seed for _, seed in chosen]
    assert seeds[:3] == seeds[3:]
    assert len(set(seeds)) == 3
    assert not set(seeds) & {spec.seed_of(ordinal) for ordinal in range(1000)}
    assert finalists(formula_spec(), study) == []


def test_a_final_training_has_its_own_settings_and_split():
    spec = _spec(set={"training.epochs": 200, "training.patience": 20})
    spec = spec.model_copy(update={"split": SplitSpec(kind="kfold")})
    setup = final_setup(spec, _study(), {"model.dropout": 0.4}, data=CARD)
    assert (setup.training.epochs, setup.training.patience, setup.model.dropout) == (200, 20, 0.4)
    assert setup.split.kind == "holdout"


def test_training_on_everything_takes_the_epochs_that_were_best():
    setup = final_setup(_spec(on="all"), _study(_trial(0, 0.1, 0.5, best_epoch=7)), {"model.dropout": 0.1}, data=CARD)
    assert (setup.split.kind, setup.training.epochs, setup.training.patience) == ("none", 7, None)


def test_training_on_everything_takes_the_epochs_that_are_asked_for():
    spec, study = _spec(on="all", set={"training.epochs": 200}), _study(_trial(0, 0.1, 0.5, best_epoch=7))
    setup = final_setup(spec, study, {"model.dropout": 0.1}, data=CARD)
    assert (setup.split.kind, setup.training.epochs) == ("none", 200)


@pytest.fixture
def card(tmp_path):
    labels = np.tile([0, 1], 200)
    np.save(tmp_path / "development_labels.npy", labels)
    return CARD.__class__(**{**vars(CARD), "folder": str(tmp_path), "valid_start": 200})


def _predictions(errors, seed):
    labels = np.tile([0, 1], 100)
    wrong = np.random.default_rng(seed).choice(200, errors, replace=False)
    labels[wrong] = 1 - labels[wrong]
    return labels.tolist()


@pytest.mark.parametrize(("errors", "tie"), [((10, 60), False), ((30, 31), True)])
def test_a_race_ends_with_a_winner_or_an_honest_tie(card, errors, tie):
    spec = _spec(finalists=2, seeds=2).model_copy(update={"split": SplitSpec()})
    trials = []
    for finalist, count in enumerate(errors):
        for seed in (7, 8):
            predicted = _predictions(count, 10 * finalist + seed)
            value = 1 - count / 200 + (0.001 if seed == 8 else 0)
            trials.append(_trial(len(trials), finalist / 10, value, stage=FINAL, seed=seed, predicted=predicted))
    outcome = race(spec, _study(*trials), data=card)
    assert outcome is not None
    assert outcome.winner.number == 1
    assert outcome.tie is tie
    assert ("tie" in str(outcome)) is tie
    assert outcome.lead.value == pytest.approx((errors[1] - errors[0]) / 200)


def test_a_finalist_with_the_better_objective_and_fewer_hits_is_no_tie(card):
    spec = _spec(finalists=2, seeds=1).model_copy(update={"split": SplitSpec()})
    trials = [
        _trial(0, 0.1, 0.9, stage=FINAL, predicted=_predictions(80, 1)),
        _trial(1, 0.2, 0.8, stage=FINAL, predicted=_predictions(10, 2)),
    ]
    outcome = race(spec, _study(*trials), data=card)
    assert outcome.winner.number == 0
    assert outcome.lead.high < 0
    assert not outcome.tie
    assert "a better objective, yet a loss by -35.00 points" in str(outcome)


@pytest.mark.parametrize(
    ("second", "final"),
    [((), {"on": "all"}), ((), {}), ([0, 1], {}), ([], {"split": SplitSpec(kind="none")})],
    ids=["all", "missing", "other images", "none"],
)
def test_answers_that_do_not_fit_the_images_leave_a_race_without_an_interval(card, second, final):
    # As after a resumed search that found a better candidate, which then was trained on everything, too.
    spec = _spec(**final).model_copy(update={"split": SplitSpec()})
    first = () if final else _predictions(10, 1)
    trials = [_trial(0, 0.1, 0.7, stage=FINAL, predicted=second), _trial(1, 0.2, 0.9, stage=FINAL, predicted=first)]
    outcome = race(spec, _study(*trials), data=card)
    assert (outcome.winner.number, outcome.lead, outcome.tie) == (1, None, False)
    assert "and 2 finalists by their mean objective" in str(outcome)


def test_one_candidate_with_two_settings_of_final_is_two_finalists(card):
    spec = _spec(set={"training.epochs": 200}).model_copy(update={"split": SplitSpec()})
    trials = [
        _trial(number, 0.1, 1 - errors / 200, stage=FINAL, predicted=_predictions(errors, number), final=final)
        for number, (errors, final) in enumerate(
            [(30, {"set": {"training.epochs": 60}}), (10, spec.final.settings), (11, None), (12, spec.final.settings)]
        )
    ]
    outcome = race(spec, _study(*trials), data=card)
    assert [[trial.number for trial in group] for group in outcome.ranking] == [[1, 2, 3], [0]]
    assert outcome.lead.value == pytest.approx(0.095)


def test_finals_that_other_images_judge_are_not_compared_with_those_of_the_spec(card):
    spec = _spec(on="all").model_copy(update={"split": SplitSpec()})
    trials = [
        _trial(0, 0.1, 0.99, stage=FINAL, predicted=_predictions(2, 0), final={}),
        _trial(1, 0.1, 0.9, stage=FINAL, final=spec.final.settings),
        _trial(2, 0.1, 0.9, stage=FINAL, final={"on": "all", "set": {"training.patience": 1}}),
    ]
    outcome = race(spec, _study(*trials), data=card)
    assert (outcome.winner.number, outcome.lead, len(outcome.ranking)) == (1, None, 2)
    assert race(spec, _study(trials[0]), data=card).winner.number == 0


def test_other_settings_of_final_are_other_trainings_and_each_keeps_its_own(run_formula):
    plain = formula_spec(trials=2)
    for epochs, expected in ((5, [5]), (5, [5]), (7, [5, 7]), (5, [5, 7])):
        spec = plain.model_copy(update={"final": FinalSpec(set={"training.epochs": epochs})})
        run = run_formula(spec)
        finals = [trial for trial in run.trials if trial.candidate.stage == FINAL]
        assert [len(trial.result.epochs) for trial in finals] == expected
        for trial in finals:
            then = with_final(spec, trial.candidate)
            setup = final_setup(then, run.study.result(), trial.candidate.parameters, data=CARD)
            assert setup.training.epochs == len(trial.result.epochs)


def test_without_final_trainings_there_is_no_race():
    assert race(_spec(), _study(_trial(0, 0.1, 0.5)), data=CARD) is None


def test_packed_classes_come_back():
    assert unpack_classes(pack_classes([0, 7, 65535])) == [0, 7, 65535]
    assert unpack_classes(pack_classes([])) == []


def test_a_paired_bootstrap_covers_the_true_difference_as_often_as_it_says():
    generator = np.random.default_rng(3)
    hits = 0
    for seed in range(200):
        hard = generator.random(300)
        first, second = (hard < 0.85).astype(float), (hard + generator.normal(0, 0.1, 300) < 0.80).astype(float)
        interval = paired_bootstrap(first, second, seed=seed, resamples=1000)
        # P(hard < 0.85) = 0.85; P(hard + noise < 0.80) = 0.7992 by simulation of 20 million draws.
        hits += interval.low <= 0.85 - 0.7992 <= interval.high
    assert 0.90 <= hits / 200 <= 0.99
