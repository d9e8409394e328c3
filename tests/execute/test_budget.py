"""--minutes: trials and epochs are fitted to the time by a measured speed, recorded, and kept on resuming."""

import math
import re
import time
from types import SimpleNamespace

import numpy as np
import optuna
import pytest

from formula_study import formula, formula_spec, measure_slowly
from hpo.errors import HpoError
from hpo.events import EpochEnded, Notice, StudyOpened
from hpo.execute.budget import Pace, as_fitted, end_of_search, fit, measure_pace
from hpo.execute.run_study import _fit, run_study, with_options
from hpo.execute.supervisor import Supervisor
from hpo.home import Home
from hpo.options import RunOptions
from hpo.records import FINAL, EndReason, TrialState
from hpo.search.pruners import build_pruner
from hpo.spec.load import load_study
from hpo.spec.study import FinalSpec
from no_pictures import draw_nothing

SECOND = Pace((0.5, 1.5))  # an epoch takes a second


def spec_of(epochs=10, trials=50, final=None, **search):
    spec = formula_spec(trials=trials, **{"pruner": "none", **search})
    training = spec.training.model_copy(update={"epochs": epochs})
    return spec.model_copy(update={"training": training, "final": final})


def test_trials_fill_the_time_and_the_epochs_stay_where_ten_trials_fit():
    # (1020 s * 0.85 - 20 s) / 10 s a trial = 84.7, for each of two workers.
    fitted = fit(spec_of(), SECOND, seconds=1020, workers=2, most=None)
    assert fitted.settings == {"search.trials": (50, 169)}
    assert fitted.text.startswith("169 trials of 10 epochs; the file has 50 of 10; an epoch takes 1 s here")
    assert fit(spec_of(), SECOND, seconds=1020, workers=2, most=60).settings == {"search.trials": (50, 60)}


def test_epochs_and_the_first_rung_shrink_where_the_time_is_short():
    pruner = {"name": "median", "warmup_epochs": 10}
    # 85 s * 0.85 - 20 s = 52.25 s; ten trials of 20 epochs, of which 60 % are trained, need 120 s.
    fitted = fit(spec_of(epochs=20, pruner=pruner), SECOND, seconds=85, workers=1, most=None)
    assert fitted.settings["training.epochs"] == (20, 8)
    assert fitted.settings["search.pruner.warmup_epochs"] == (10, 4)
    assert fitted.settings["search.trials"] == (50, 10)
    halving = spec_of(epochs=40, pruner={"name": "successive_halving", "min_epochs": 8})
    short = fit(halving, SECOND, seconds=85, workers=1, most=None).settings
    assert short["training.epochs"][1] < 40
    assert short["search.pruner.min_epochs"] == (8, round(8 * short["training.epochs"][1] / 40))
    for pruner, rung in (("auto", None), ({"name": "auto", "min_epochs": 8}, 8), ("successive_halving", None)):
        short = fit(spec_of(epochs=40, pruner=pruner), SECOND, seconds=60, workers=1, most=None).settings
        share = short["training.epochs"][1] / 40
        assert short.get("search.pruner.min_epochs") == (rung and (rung, round(share * rung)))


def test_no_training_becomes_shorter_than_a_quarter():
    fitted = fit(spec_of(epochs=20), SECOND, seconds=40, workers=1, most=None)
    assert fitted.settings == {"training.epochs": (20, 5), "search.trials": (50, 2)}


def test_rungs_that_count_on_from_fold_to_fold_leave_what_the_pruner_leaves():
    spec = spec_of(epochs=50, pruner={"name": "successive_halving", "min_epochs": 5})
    spec = spec.model_copy(update={"split": spec.split.model_copy(update={"kind": "kfold", "folds": 3})})
    study = optuna.create_study(pruner=build_pruner(spec), direction="maximize")
    trained, trials = 0, 60
    for level in np.random.default_rng(0).random(trials):
        trial = study.ask()
        for step in range(1, 151):
            trial.report(level, step)
            if trial.should_prune():
                break
        trained += step
        study.tell(trial, level)
    share = trained / (trials * 150)
    text = fit(spec, SECOND, seconds=10200, workers=1, most=None).text
    told = int(re.search(r"leaves about (\d+)% of the epochs", text)[1]) / 100
    # (5 + 10 / 3 + 30 / 9 + 90 / 27 + 15 / 81) / 150 of many trials, twice that of few: a fifth.
    assert told == 0.2
    assert share == pytest.approx(told, rel=0.5)


def test_final_trainings_are_in_the_budget():
    final = FinalSpec(set={"training.epochs": 200}, seeds=2)
    plain, finals = (fit(spec_of(final=each), SECOND, seconds=1020, workers=2, most=None) for each in (None, final))
    # Both workers train one of 200 s: 20 trials less each.
    assert finals.settings["search.trials"][1] == plain.settings["search.trials"][1] - 40
    assert (plain.closing, finals.closing) == (10.0, 210.0)
    assert "final training 3 min 20 s" in finals.text


def test_final_trainings_shrink_where_they_do_not_fit_beside_the_search():
    final = FinalSpec(set={"training.epochs": 200})
    # 320 s * 0.85 - 20 s = 252 s: ten trials of 10 s leave 152 s.
    fitted = fit(spec_of(final=final), SECOND, seconds=320, workers=1, most=10)
    assert fitted.settings == {"final.set.training.epochs": (200, 152), "search.trials": (50, 10)}
    assert "final.set.training.epochs 152 in place of 200" in fitted.text
    assert fitted.closing == 162.0
    # 150 s: 60 % of them for the final training, and ten trials of 6 s in the rest.
    short = fit(spec_of(final=final), SECOND, seconds=200, workers=1, most=10)
    assert short.settings == {
        "training.epochs": (10, 6),
        "final.set.training.epochs": (200, 90),
        "search.trials": (50, 10),
    }
    # 31 s: 18 s of them.
    assert fit(spec_of(final=final), SECOND, seconds=60, workers=1, most=10).closing == 18.0 + 3.0
    begun = fit(spec_of(final=final), SECOND, seconds=200, workers=1, most=10, begun=True)
    assert "final.set.training.epochs" not in begun.settings, "a resumed study's final trainings stay what they were"
    record = short.to_json()
    assert as_fitted(spec_of(final=final), record, trials=True).final.set == {"training.epochs": 90}
    assert as_fitted(spec_of(), record, trials=True).final is None
    assert as_fitted(spec_of(final=FinalSpec()), record, trials=True).final.set == {}


def test_searched_epochs_and_the_cells_of_a_grid_stay():
    space = {"training.epochs": {"int": [10, 30]}, "model.dropout": {"float": [0.0, 0.9]}}
    searched = fit(spec_of(space=space), SECOND, seconds=60, workers=1, most=None)
    assert searched.settings == {"search.trials": (50, 1)}
    assert "the epochs stay: they are searched" in searched.text
    grid = spec_of(epochs=12, sampler="grid", space={"model.dropout": {"choice": [0.0, 0.1, 0.2]}}, trials=3)
    # 47 s * 0.85 - 20 s = 19.95 s for three trials of 12 s.
    assert fit(grid, SECOND, seconds=47, workers=1, most=None).settings == {"training.epochs": (12, 6)}


def test_a_study_that_has_begun_keeps_its_epochs_and_counts_its_trials():
    fitted = fit(spec_of(epochs=20), SECOND, seconds=60, workers=1, most=None, done=30, begun=True)
    assert fitted.settings == {"search.trials": (50, 31)}
    assert "the epochs stay: it has begun" in fitted.text


def test_what_was_fitted_is_kept_until_the_file_says_otherwise():
    record = {"settings": {"training.epochs": [10, 4], "search.trials": [50, 12]}, "text": ""}
    kept = as_fitted(spec_of(), record, trials=True)
    assert (kept.training.epochs, kept.search.trials) == (4, 12)
    assert as_fitted(spec_of(), record, trials=False).search.trials == 50
    assert as_fitted(spec_of(epochs=11), record, trials=True).training.epochs == 11
    assert "monitor" not in kept.training.model_fields_set
    assert as_fitted(spec_of(), {}, trials=True) == spec_of()


def test_the_search_hands_out_nothing_once_the_time_is_needed_for_the_final_training(run_formula, monkeypatch):
    ends = []

    class Late(Supervisor):
        def __init__(self, *given, **named):
            super().__init__(*given, **named, search_until=float("inf"))
            ends.append(self)

    monkeypatch.setattr("study_fixtures.Supervisor", Late)

    def end_search(event):
        if isinstance(event, EpochEnded) and event.number == 1:
            ends[0]._search_until = time.monotonic()

    run = run_formula(spec_of(epochs=3, final=FinalSpec(seeds=2)), trainer=formula, watch=end_search)
    assert run.reason is EndReason.TIMEOUT
    assert run.reason.orderly
    assert [trial.candidate.stage for trial in run.trials] == [None, None, FINAL, FINAL]
    assert {trial.state for trial in run.trials} == {TrialState.COMPLETE}


def test_the_search_ends_so_long_before_the_run_but_has_half_of_the_time():
    now = time.monotonic()
    assert end_of_search(now + 100, 30) == pytest.approx(now + 70, abs=1)
    assert end_of_search(now + 100, 90) == pytest.approx(now + 50, abs=1)
    assert end_of_search(float("inf"), 0.0) == float("inf")


@pytest.mark.parametrize("sampler", ["random", "grid"])
def test_what_was_fitted_with_trials_is_compared_with_the_number_in_the_file(tmp_path, monkeypatch, sampler):
    space = {"model.dropout": {"choice": [0.0, 0.1, 0.2]}}
    written, asked = spec_of(trials=50, sampler=sampler, space=space), RunOptions(minutes=17, trials=30)
    monkeypatch.setattr("hpo.execute.run_study.await_job", lambda *_: SECOND)
    plan = SimpleNamespace(devices=("cpu",), threads=1)
    run = SimpleNamespace(
        spec=with_options(written, asked),
        written=50,
        options=asked,
        home=Home.at(tmp_path),
        join="",
        deadline=time.monotonic() + 1020,
        factory=SimpleNamespace(plan=lambda *_, **__: plan),
        jobs=SimpleNamespace(submit=lambda *_: None),
        events=SimpleNamespace(emit=None),
        end=None,
        notify=lambda _: None,
    )
    spec, fitted = _fit(run, SimpleNamespace(data=None, devices=()))
    assert spec.search.trials == 30
    resumed = as_fitted(written, fitted.to_json(), trials=True)
    assert resumed.search.trials == (30 if sampler == "random" else 50), "a grid keeps its number"


@pytest.fixture
def digits(tmp_path, monkeypatch, digits_cache):
    """run(**options) -> (trials, events) of digits-mlp on one thread, at pretended 100 s an epoch."""
    monkeypatch.setenv("HPO_DATA", str(digits_cache))
    monkeypatch.setattr("hpo.execute.engines.local.cores", lambda: 1)
    monkeypatch.setattr("hpo.execute.subscribers.tracking.draw_study", draw_nothing)
    monkeypatch.setattr("hpo.execute.run_study.measure_pace", measure_slowly)

    def run(closing=0.0, overrides=None, **options):
        changes = {"training.epochs": 8, "keep.models": "none", "search.pruner": "none", **(overrides or {})}
        spec, events = load_study("digits-mlp", overrides=changes), []
        named = RunOptions(workers=0, home=tmp_path, **options)
        study = run_study(spec, named, closing=closing, watch=events.append)
        return study, events

    return run


@pytest.mark.slow
def test_a_named_study_in_minutes_says_what_it_chose_and_is_resumed_as_it_was_fitted(digits):
    # 6000 s * 0.85 - 20 s, less what the start takes: ten trials of 8 epochs at 100 s each do not fit.
    study, events = digits(minutes=100)
    told = [event.text for event in events if isinstance(event, Notice) and event.text.startswith("100 min: ")]
    assert "the file has 20 of 8" in told[0]
    assert "an epoch takes 1e+02 s here (mean of 2 candidates)" in told[0]
    epochs, trials = (study.fitted["settings"][path][1] for path in ("training.epochs", "search.trials"))
    assert 2 <= epochs < 8
    assert 9 <= trials < 20
    assert study.spec["training"]["epochs"] == epochs
    assert [(trial.state, trial.candidate.stage) for trial in study.trials] == [(TrialState.COMPLETE, None)] * trials
    assert {len(trial.result.epochs) for trial in study.trials} == {epochs}
    again, events = digits()
    opened = next(event for event in events if isinstance(event, StudyOpened))
    assert (opened.budget, len(again.trials), again.fitted) == (trials, trials, study.fitted)
    more, _ = digits(trials=trials + 1)
    assert {len(trial.result.epochs) for trial in more.trials} == {epochs}
    assert len(more.trials) == trials + 1


@pytest.mark.slow
def test_the_speed_of_real_candidates_is_measured(digits_cache, monkeypatch):
    from hpo.data.prepare import prepare

    monkeypatch.setenv("HPO_DATA", str(digits_cache))
    spec = load_study("digits-mlp")
    data = prepare(spec.data, spec.split)
    assert len(measure_pace(spec, data, "cpu", 1, seconds=0.0).epochs) == 1, "no time for more than one"
    pace = measure_pace(spec, data, "cpu", 1, seconds=6e4)
    assert len(pace.epochs) == 4
    assert 0 < pace.epoch < 60
    assert pace.features == 0


@pytest.mark.slow
def test_a_timeout_leaves_its_closing_to_the_final_training(digits, monkeypatch):
    seen = []

    def supervisor(*given, search_until, **named):
        seen.append(search_until - time.monotonic())
        raise HpoError("enough is seen.", "")

    monkeypatch.setattr("hpo.execute.run_study.Supervisor", supervisor)
    for final in (None, {}):
        with pytest.raises(HpoError, match="enough is seen"):
            digits(timeout=1000, closing=400, overrides={"final": final})
    assert seen[0] == math.inf, "what runs at the end of the time is tried again"
    assert 400 < seen[1] < 600
