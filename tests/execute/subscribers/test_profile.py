"""A profiled run adds up what its trials took, and what was done beside them."""

import json
from dataclasses import replace

import pytest

from formula_study import formula, formula_spec
from hpo.errors import SpecError
from hpo.execute.run_study import run_study, with_options
from hpo.execute.subscribers import profile as profiling
from hpo.options import RunOptions
from hpo.profile import Clock, Limit, Profile, StudyProfiled, timed
from hpo.records import TrialEnded
from hpo.spec.study import SplitSpec

SECONDS = {"load": 1.0, "forward": 3.0, "backward": 5.0, "profile": 2.0}
CPU = {"load": 0.5, "forward": 2.0, "backward": 4.0, "profile": 1.0}
SETTINGS = {"device": "cpu", "precision": "float32", "threads": "1"}


def _profiled(task, device):
    """The formula, as a worker that profiles would tell it."""
    assert task.profile
    training = formula(task, device)
    message = next(training)
    while not isinstance(message, TrialEnded):
        go_on = yield message
        message = training.send(go_on)
    profile = Profile(SECONDS, CPU, flops=60e9, traffic=6e9, peak_flops=20e9, peak_traffic=10e9)
    yield replace(message, result=replace(message.result, profile=profile, settings=SETTINGS))


def _sum_up(run_formula, spec, trainer=_profiled, **options):
    profiler = profiling.Profiler()
    run = run_formula(spec, trainer=trainer, watch=profiler.hear, **options)
    profiler.stop()
    return run, profiler.sum_up(workers=1, beside=[({"ask": 0.5}, {"ask": 0.25}), ({"ask": 1.0}, {"ask": 0.0})])


def test_phases_are_summed_over_the_trials_of_the_run(run_formula):
    _, told = _sum_up(run_formula, formula_spec(trials=3), profile=True)
    assert told.trials == 3
    assert told.phases["forward"] == (9.0, 6.0)
    assert told.beside == {"ask": (1.5, 0.25), "profile": (6.0, 3.0)}  # no other run pays for being looked at
    assert told.phases["idle"][0] >= 0
    # Of the CPU's time: what others took of a shared machine is not the network's fault.
    assert told.limits == (Limit("cpu", "float32", "1", 10e9, 20e9, 1e9, 10e9),)


def test_trials_of_earlier_runs_do_not_count(run_formula):
    _sum_up(run_formula, formula_spec(trials=2), profile=True)
    _, told = _sum_up(run_formula, formula_spec(trials=5), profile=True)
    assert told.trials == 3


def test_a_run_without_profiled_trials_has_an_empty_profile(run_formula):
    _, told = _sum_up(run_formula, formula_spec(trials=2), trainer=formula)
    assert (told.trials, told.limits) == (0, ())
    assert list(told.phases) == ["idle"]


@pytest.mark.parametrize(
    ("flops", "traffic", "bound"),
    [(50e9, 1e9, "arithmetic"), (5e9, 5e9, "memory"), (1e9, 0.1e9, "neither"), (100e9, 10e9, "arithmetic")],
)
def test_the_lower_roof_limits_unless_the_network_stays_far_below_it(flops, traffic, bound):
    assert Limit("cpu", "float32", "1", flops, 100e9, traffic, 10e9).bound == bound


def test_timed_studies_and_trackers_have_the_methods_that_are_named():
    from hpo.search.study import Study
    from hpo.tracking.tracker import Tracker

    assert all(hasattr(Study, name) for name in profiling.STUDY)
    assert all(hasattr(Tracker, name) for name in profiling.TRACKER)
    clock = Clock()
    tracker = timed(Tracker.__new__(Tracker), clock, **profiling.TRACKER)
    with pytest.raises(AttributeError):  # it was never opened
        tracker.kept_models(None)
    assert not clock.seconds


def test_precision_is_that_of_the_option():
    spec = formula_spec()
    assert with_options(spec, RunOptions()).training.precision == "auto"
    assert with_options(spec, RunOptions(precision="bfloat16")).training.precision == "bfloat16"
    with pytest.raises(SpecError, match="--precision float16"):
        with_options(spec, RunOptions(precision="float16"))


def test_a_profiled_run_tells_its_profile_last_but_one_and_keeps_it(tmp_path, monkeypatch):
    for name in ("HPO_STORAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HPO_DATA", str(tmp_path / "data"))
    events = []
    spec = formula_spec(trials=1, space={"model.hidden": {"int": [8, 16]}})
    spec = spec.model_copy(update={"split": SplitSpec(kind="holdout")})
    result = run_study(spec, workers=0, home=tmp_path, precision="float32", profile=True, watch=events.append)
    assert isinstance(events[-2], StudyProfiled)
    assert {"forward", "backward", "optimizer", "idle"} < events[-2].phases.keys()
    assert {"ask", "tell", "track", "prepare", "profile"} < events[-2].beside.keys()
    assert result.best.result.settings["precision"] == events[-2].limits[0].precision == "float32"
    (kept,) = tmp_path.glob("mlruns/artifacts/formula/*/artifacts/profile.json")
    assert json.loads(kept.read_text())["phases"]["forward"][0] > 0
