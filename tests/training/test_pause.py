"""A training that was paused and goes on is, bit for bit, one in one go, and trains no epoch twice."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hpo.records import TrialState
from hpo.spec.models import MlpSpec
from hpo.spec.study import DataSpec, Setup, SplitSpec
from hpo.spec.training import AugmentSpec, OptimizerSpec, ScheduleSpec, TrainingSpec
from hpo.training.stack import Stacks
from hpo.training.trial import TrialPlan, train_trial
from hpo.training.validation import VALIDATION

HOLDOUT, FOLDS = SplitSpec(kind="holdout"), SplitSpec(kind="kfold", folds=3)
# All that a training remembers from one epoch to the next: momenta, dropout, data order, averages, schedule.
RICH = {"schedule": ScheduleSpec(name="one_cycle"), "augment": AugmentSpec(rotate=10, mixup=0.4), "ema": 0.9}


def _setup(split=HOLDOUT, epochs=6, **training):
    return Setup(
        data=DataSpec(name="digits"),
        split=split,
        model=MlpSpec(kind="mlp", hidden=16, dropout=0.3, batch_norm=True),
        training=TrainingSpec(
            epochs=epochs, precision="float32", optimizer=OptimizerSpec(name="adamw", lr=0.02), **training
        ),
    )


def _train(setup, card, folder, file=None, *, pause_at=None, stacks=None):
    """Epochs and result of a trial; the verdict after so many epochs is to end it."""
    plan = TrialPlan(
        setup, card, 0, seed=5, folder=folder, device_name="cpu", checkpoint=file, pausable=True, not_stacked="pauses"
    )
    training = train_trial(plan, stacks=stacks)
    epochs = []
    try:
        epoch = next(training)
        while True:
            epochs += [epoch] if epoch else []
            if stacks is not None:
                torch.rand(1)  # another training of this process draws between two epochs
            epoch = training.send(epoch is None or len(epochs) != pause_at)
    except StopIteration as end:
        return epochs, end.value


def _untimed(epochs):
    return [dataclasses.replace(epoch, seconds=0.0) for epoch in epochs]


@pytest.fixture(scope="module", params=[False, True], ids=["alone", "beside others"])
def in_one_go(request, digits_card, tmp_path_factory):
    torch.set_num_threads(1)
    folder, stacks = tmp_path_factory.mktemp("whole") / "a", Stacks(2) if request.param else None
    return stacks, *_train(_setup(**RICH), digits_card, folder, stacks=stacks), folder


@pytest.mark.parametrize("pauses", [[1], [2, 3, 5]])
def test_a_thawed_trial_ends_bit_for_bit_as_one_in_one_go(digits_card, tmp_path, in_one_go, pauses):
    torch.set_num_threads(1)
    stacks, whole, result, folder = in_one_go
    setup, file, trained = _setup(**RICH), tmp_path / "saved" / "one.pt", []
    for pause in pauses:
        epochs, paused = _train(setup, digits_card, tmp_path / "b", file, pause_at=pause, stacks=stacks)
        assert paused.state is TrialState.PRUNED
        assert len(epochs) == pause
        # What was told before is told again as it was; its seconds say that it was not trained again.
        assert epochs[: len(trained)] == trained
        trained = epochs
        torch.manual_seed(99)
    again, resumed = _train(setup, digits_card, tmp_path / "b", file, stacks=stacks)
    assert again[: len(trained)] == trained
    assert _untimed(again) == _untimed(whole)
    assert dataclasses.replace(resumed, folder=result.folder) == result
    first, second = (load_file(each / "weights.safetensors") for each in (folder, tmp_path / "b"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    first, second = (np.load(each / VALIDATION)["probabilities"] for each in (folder, tmp_path / "b"))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("pause", [2, 3, 4])
def test_a_trial_may_be_paused_in_a_fold_and_between_two(digits_card, tmp_path, pause):
    torch.set_num_threads(1)
    setup, file = _setup(split=FOLDS, epochs=3), tmp_path / "one.pt"
    whole, result = _train(setup, digits_card, tmp_path / "a")
    trained, _ = _train(setup, digits_card, tmp_path / "b", file, pause_at=pause)
    again, resumed = _train(setup, digits_card, tmp_path / "b", file)
    assert again[:pause] == trained
    assert _untimed(again) == _untimed(whole)
    assert resumed == result


def test_an_earlier_pause_leaves_the_later_state(digits_card, tmp_path):
    """A retry meets its rungs again, and may be paused at one that its checkpoint is beyond."""
    setup, file = _setup(), tmp_path / "one.pt"
    trained, _ = _train(setup, digits_card, tmp_path, file, pause_at=4)
    _train(setup, digits_card, tmp_path, file, pause_at=2)
    again, _ = _train(setup, digits_card, tmp_path, file)
    assert again[:4] == trained
