"""A profiled run adds up where the time of its trials went."""

import json
from dataclasses import replace

import pytest

from formula_study import formula, formula_spec
from hpo.errors import SpecError
from hpo.events import StudyEnded, StudyProfiled, TrialEnded
from hpo.execute.run_study import run_study, with_options
from hpo.execute.subscribers.profile import StudyProfiler
from hpo.options import RunOptions
from hpo.records import Profile
from hpo.spec.study import SplitSpec

PROFILE = Profile({"forward": 3.0, "backward": 5.0}, {"aten::addmm": 0.5})


def _profiled(task, device):
    """The formula as the training function, with a profile."""
    assert task.profile
    training = formula(task, device)
    message = next(training)
    while not isinstance(message, TrialEnded):
        go_on = yield message
        message = training.send(go_on)
    yield replace(message, result=replace(message.result, profile=PROFILE, seconds=9.0))


def _sum(run_formula, spec, trainer=_profiled, **options):
    profiler = StudyProfiler()
    run_formula(spec, trainer=trainer, watch=profiler.hear, **options)
    profiler.stop()
    return profiler.profile(workers=1, outside={"export and figures": 1.5})


def test_phases_are_summed_over_the_trials_of_the_run(run_formula):
    summed = _sum(run_formula, formula_spec(trials=3), profile=True)
    assert summed.trials == 3
    assert summed.phases == {"forward": 9.0, "backward": 15.0, "between epochs": 3.0, "idle": 0.0}
    assert summed.outside == {"export and figures": 1.5}
    assert summed.operators == {"aten::addmm": 0.5}


def test_trials_of_earlier_runs_do_not_count(run_formula):
    _sum(run_formula, formula_spec(trials=2), profile=True)
    assert _sum(run_formula, formula_spec(trials=5), profile=True).trials == 3


def test_a_run_without_profiled_trials_has_an_empty_profile(run_formula):
    summed = _sum(run_formula, formula_spec(trials=2), trainer=formula)
    assert (summed.trials, summed.operators) == (0, {})
    assert list(summed.phases) == ["idle"]


def test_precision_is_that_of_the_option():
    spec = formula_spec()
    assert with_options(spec, RunOptions()).training.precision == "auto"
    assert with_options(spec, RunOptions(precision="bfloat16")).training.precision == "bfloat16"
    with pytest.raises(SpecError, match="--precision float16"):
        with_options(spec, RunOptions(precision="float16"))


@pytest.mark.slow
def test_a_profiled_run_tells_its_profile_once_before_its_end_and_keeps_it(tmp_path, monkeypatch):
    for name in ("HPO_STORAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HPO_DATA", str(tmp_path / "data"))
    events = []
    spec = formula_spec(trials=1, space={"model.hidden": {"int": [8, 16]}})
    spec = spec.model_copy(update={"split": SplitSpec(kind="holdout")})
    result = run_study(spec, workers=0, home=tmp_path, precision="float32", profile=True, watch=events.append)
    (profiled,) = [event for event in events if isinstance(event, StudyProfiled)]
    assert isinstance(events[-1], StudyEnded)
    assert {"forward", "backward", "optimizer", "idle"} < profiled.phases.keys()
    assert profiled.outside["export and figures"] > 0
    assert profiled.operators
    assert result.best.result.settings["precision"] == "float32"
    (kept,) = tmp_path.glob("mlruns/artifacts/formula/*/artifacts/profile.json")
    assert json.loads(kept.read_text())["phases"]["forward"] > 0
