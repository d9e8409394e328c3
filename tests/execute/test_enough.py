"""search.enough: a search ends where nothing is left to gain, goes on where much is, and decides once."""

import threading

import numpy as np
import pytest

from formula_study import formula_spec
from hpo.events import EpochEnded, TrialEnded, TrialStarted
from hpo.execute.enough import standard_error
from hpo.records import FINAL, EndReason, Epoch, TrialResult, TrialState
from hpo.spec.study import FinalSpec

A = "valid_accuracy"
IMAGES = 1000
SPACE = {"model.dropout": {"float": [0.0, 0.9]}, "training.optimizer.momentum": {"float": [0.0, 0.9]}}


def spec_of(name="formula", *, enough="auto", trials=60, **search):
    changed = {"sampler": "random", "pruner": "none", "space": SPACE, **search}
    return formula_spec(enough=enough, trials=trials, **changed).model_copy(update={"name": name})


def noisy(accuracy):
    """A trainer whose validation accuracy is that of IMAGES images, each right with probability accuracy(setup)."""

    def train(task, device):
        rng, epochs = np.random.default_rng(task.seed), []
        for number in range(1, task.setup.training.epochs + 1):
            share = number / task.setup.training.epochs
            right = int(rng.binomial(IMAGES, accuracy(task.setup) * share))
            scores = {"train_loss": 1.0, "valid_loss": 1 - right / IMAGES, "valid_accuracy": right / IMAGES}
            epochs.append(Epoch(number=number, scores=scores, learning_rate=0.1, seconds=0.001))
            go_on = yield EpochEnded(task.number, epochs[-1])
            if not go_on:
                break
        state = TrialState.COMPLETE if go_on else TrialState.PRUNED
        confusion = ((right, IMAGES - right), (0, 0))
        yield TrialEnded(
            TrialResult(
                task.number, state, None, len(epochs), tuple(epochs), epochs[-1].scores, 0.01, confusion=confusion
            )
        )

    return train


def flat(setup):
    """Hardly any candidate is better than another."""
    return 0.9 - 0.001 * setup.model.dropout


def steep(setup):
    """The candidates differ by far more than the noise, in several directions."""
    return 0.9 - 0.8 * abs(setup.model.dropout - 0.31) ** 0.5 * (1 + np.sin(9 * setup.training.optimizer.momentum)) / 2


def parameters_of(run):
    return [
        trial.candidate.parameters
        for trial in sorted(run.trials, key=lambda trial: trial.candidate.ordinal)
        if trial.state.finished and trial.candidate.stage is None
    ]


def test_a_search_with_nothing_left_to_gain_ends_early_and_says_why(run_formula):
    run = run_formula(spec_of(), trainer=noisy(flat))
    assert run.reason is EndReason.ENOUGH
    assert run.reason.orderly
    assert 20 <= len(run.trials) < 60
    text = run.study.result().enough
    assert text.startswith(f"after {len(run.trials)} trials valid_accuracy can probably be raised by no more than 0.0")
    assert "less than the standard error 0.00" in text


def test_a_search_with_much_to_gain_goes_on_to_its_budget(run_formula):
    run = run_formula(spec_of(trials=40), trainer=noisy(steep))
    assert (run.reason, len(run.trials)) == (EndReason.BUDGET, 40)
    assert run.study.result().enough == ""


def test_off_is_the_default_and_a_large_gain_ends_any_search(run_formula):
    off = formula_spec(trials=25, space=SPACE, pruner="none")
    assert off.search.enough == "off"
    assert run_formula(off, trainer=noisy(flat)).reason is EndReason.BUDGET
    wide = spec_of("wide", enough={"gain": 5.0})
    run = run_formula(wide, trainer=noisy(steep))
    assert (run.reason, len(run.trials)) == (EndReason.ENOUGH, 20)
    assert run.study.result().enough.endswith("less than search.enough.gain 5")


def test_what_was_found_stays_so_until_setting_or_space_change(run_formula):
    first = run_formula(spec_of(), trainer=noisy(flat))
    again = run_formula(spec_of(trials=80), trainer=noisy(flat))
    assert again.reason is EndReason.ENOUGH
    assert not [event for event in again.events if isinstance(event, TrialStarted)]
    assert again.study.result().enough == first.study.result().enough
    count = len(first.trials)
    further = run_formula(spec_of(enough="off", trials=count + 2), trainer=noisy(flat))
    assert (further.reason, len(further.trials)) == (EndReason.BUDGET, count + 2)
    assert further.study.result().enough == ""


def test_an_interrupted_search_ends_after_the_same_candidates(run_formula):
    whole = run_formula(spec_of("whole"), trainer=noisy(flat))
    for cut in (4, 22 * 3 - 1):
        interrupted, seen = threading.Event(), []

        def stop(event, cut=cut, interrupted=interrupted, seen=seen):
            seen.append(isinstance(event, EpochEnded))
            if sum(seen) == cut:
                interrupted.set()

        run_formula(spec_of("pieces"), trainer=noisy(flat), watch=stop, interrupted=interrupted)
    pieces = run_formula(spec_of("pieces"), trainer=noisy(flat))
    assert TrialState.STOPPED in {trial.state for trial in pieces.trials}
    assert pieces.reason is EndReason.ENOUGH
    assert parameters_of(pieces) == parameters_of(whole)
    assert pieces.study.result().enough == whole.study.result().enough


def test_final_trainings_follow(run_formula):
    spec = spec_of(enough={"gain": 5.0}).model_copy(update={"final": FinalSpec(seeds=2)})
    run = run_formula(spec, trainer=noisy(steep))
    assert run.reason is EndReason.ENOUGH
    assert [trial.candidate.stage for trial in run.trials][20:] == [FINAL, FINAL]


def test_pruned_trials_count_as_trials_with_a_score(run_formula):
    pruner = {"name": "successive_halving", "min_epochs": 1, "reduction_factor": 2}
    run = run_formula(spec_of(pruner=pruner, trials=120), trainer=noisy(flat))
    states = [trial.state for trial in run.trials]
    assert run.reason is EndReason.ENOUGH
    assert states.count(TrialState.PRUNED) > 5


@pytest.mark.parametrize(
    ("result", "error"),
    [
        # An accuracy of 0.9 of 1,000 images: sqrt(0.9 * 0.1 / 1000).
        (TrialResult(0, TrialState.COMPLETE, confusion=((900, 100), (0, 0))), 0.0095),
        # All right: one image more or less.
        (TrialResult(0, TrialState.COMPLETE, confusion=((50, 0), (0, 50))), 0.01),
        # Folds of 0.8, 0.9 and 1.0: sqrt(1/3 + 1/2) * 0.1.
        (
            TrialResult(0, TrialState.COMPLETE, folds=tuple({"valid_accuracy": part} for part in (0.8, 0.9, 1.0))),
            0.0913,
        ),
        (TrialResult(0, TrialState.COMPLETE), float("inf")),
    ],
)
def test_the_standard_error_is_that_of_the_validation(result, error):
    assert standard_error(formula_spec(), result) == pytest.approx(error, rel=0.05)
