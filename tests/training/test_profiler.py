"""A profiled trial reports the time of its epochs by phase and ends as an unprofiled one does."""

from dataclasses import replace
from pathlib import Path

import pytest

from hpo.records import TrialResult
from hpo.spec.models import MlpSpec
from hpo.spec.study import DataSpec, Setup, SplitSpec
from hpo.spec.training import AugmentSpec, TrainingSpec
from hpo.training.profiler import PHASES, phase
from hpo.training.trial import TrialPlan, train_trial


def _train(card, folder, *, profile, **training):
    setup = Setup(
        data=DataSpec(name="digits"),
        split=SplitSpec(kind="holdout"),
        model=MlpSpec(kind="mlp", hidden=32, dropout=0.2),
        training=TrainingSpec(
            **{"epochs": 3, "precision": "float32", "augment": AugmentSpec(flip_horizontal=True), **training}
        ),
    )
    trial, epochs = train_trial(TrialPlan(setup, card, 0, 5, folder, "cpu", profile=profile)), []
    try:
        epochs.append(next(trial))
        while True:
            epochs.append(trial.send(True))
    except StopIteration as end:
        return end.value, epochs


@pytest.fixture(scope="module")
def trained(digits_card, tmp_path_factory):
    """Result and epochs of a profiled trial."""
    return _train(digits_card, tmp_path_factory.mktemp("profiled"), profile=True)


def test_a_profile_changes_no_result_and_is_made_only_on_request(digits_card, tmp_path, trained):
    (profiled, _), (plain, _) = trained, _train(digits_card, tmp_path, profile=False)
    assert plain.profile is None
    assert profiled.scores == plain.scores
    assert profiled.predicted == plain.predicted


@pytest.mark.parametrize("micro_batch", [None, pytest.param(8, marks=pytest.mark.slow)])
def test_the_phases_of_a_profile_add_up_to_the_time_of_the_epochs(digits_card, tmp_path, trained, micro_batch):
    small = micro_batch and _train(digits_card, tmp_path, profile=True, micro_batch=micro_batch)
    result, epochs = small or trained
    seconds = result.profile.seconds
    assert set(seconds) == {*PHASES, "evaluate"}
    assert all(value > 0 for value in seconds.values())
    assert sum(seconds.values()) == pytest.approx(sum(epoch.seconds for epoch in epochs))


def test_a_profile_keeps_the_slowest_operators_and_their_share_in_all_of_them(
    digits_card, tmp_path, trained, monkeypatch
):
    kept = trained[0].profile.operators
    assert list(kept.values()) == sorted(kept.values(), reverse=True)
    assert len(kept) == 8  # which ones they are depends on the machine
    assert 0 < sum(kept.values()) < 1
    monkeypatch.setattr("hpo.training.profiler._OPERATORS", 1000)
    result, _ = _train(digits_card, tmp_path, profile=True)
    assert "aten::addmm" in result.profile.operators
    assert sum(result.profile.operators.values()) == pytest.approx(1)


def test_a_training_too_short_to_be_recorded_has_undivided_steps(digits_card, tmp_path):
    result, epochs = _train(digits_card, tmp_path, profile=True, epochs=1, batch_size=1500)
    assert set(result.profile.seconds) == {"steps", "evaluate"}
    assert sum(result.profile.seconds.values()) == pytest.approx(epochs[0].seconds)


def test_labels_cost_nothing_without_a_profiler():
    assert phase("forward") is phase("backward")


def test_profiles_are_stored_and_those_of_older_versions_load(trained):
    result, _ = trained
    stored = result.to_json()
    assert TrialResult.from_json(stored) == replace(result, folder=Path(result.folder).name)
    old = {
        "seconds": {"forward": 2.0},
        "cpu_seconds": {"forward": 1.0},
        "flops": 1e9,
        "traffic": 1e8,
        "peak_flops": 1e9,
    }
    assert TrialResult.from_json({**stored, "profile": old}).profile.seconds == {"forward": 2.0}
    del stored["profile"]
    assert TrialResult.from_json(stored).profile is None
