"""A real search whose first epochs go through a share of the images, on the digits."""

import pytest

from hpo.errors import SpecError
from hpo.execute.run_study import run_study
from hpo.jobs.rerun import Agreement, rerun
from hpo.records import TrialState
from hpo.spec.load import load_study
from no_pictures import draw_nothing

HALVING = {"name": "successive_halving", "min_epochs": 1, "reduction_factor": 3}
SETTINGS = {
    "training.epochs": 9,
    "training.patience": None,
    "training.data_growth": 1 / 9,
    "training.precision": "float32",
    "training.checkpoint": 1,
    "keep.models": "none",
    "search.sampler": "random",
    "search.pruner": HALVING,
}


@pytest.fixture(scope="module")
def project(tmp_path_factory, digits_cache):
    """A folder with a study of eight trials, and what the study found."""
    folder = tmp_path_factory.mktemp("project")
    patch = pytest.MonkeyPatch()
    patch.setenv("HPO_DATA", str(digits_cache))
    patch.setattr("hpo.execute.engines.local.cores", lambda: 1)
    patch.setattr("hpo.execute.subscribers.tracking.draw_study", draw_nothing)
    result = run_study(load_study("digits-mlp", overrides=SETTINGS), trials=8, workers=1, home=folder)
    yield folder, result
    patch.undo()


def test_poor_candidates_are_ended_at_the_rungs_by_short_epochs(project):
    _, result = project
    ended = {len(trial.result.epochs) for trial in result.trials if trial.state is TrialState.PRUNED}
    assert ended
    assert ended <= {1, 3}
    complete = [trial for trial in result.trials if trial.state is TrialState.COMPLETE]
    assert {len(trial.result.epochs) for trial in complete} == {9}
    assert result.best.value > 0.9


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.PRUNED])
def test_a_trial_of_growing_data_repeats_bit_for_bit(project, state):
    folder, result = project
    number = next(trial.number for trial in result.trials if trial.state is state)
    again = rerun(f"digits-mlp#{number}", home=folder)
    assert (again.agreement, again.ended_again) == (Agreement.EQUAL, str(state))


def test_a_search_cannot_vary_what_its_pruner_compares_by():
    grown = {"search.space": {"training.data_growth": {"choice": [0.1, 1.0]}}}
    with pytest.raises(SpecError, match="at one epoch"):
        load_study("digits-mlp", overrides={**SETTINGS, **grown})
    load_study("digits-mlp", overrides={**SETTINGS, **grown, "search.pruner": "none"})
