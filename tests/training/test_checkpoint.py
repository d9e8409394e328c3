"""A training that was interrupted goes on from its file, to the very numbers of one in one go."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hpo.records import TrialState
from hpo.spec.models import MlpSpec
from hpo.spec.study import DataSpec, Setup, SplitSpec
from hpo.spec.training import AugmentSpec, OptimizerSpec, ScheduleSpec, TrainingSpec
from hpo.training.checkpoint import Checkpoint
from hpo.training.trial import TrialPlan, train_trial
from hpo.training.validation import VALIDATION

HOLDOUT, FOLDS = SplitSpec(kind="holdout"), SplitSpec(kind="kfold", folds=3)
# All that a training remembers from one epoch to the next: momenta, dropout, data order, averages, schedule.
RICH = {
    "schedule": ScheduleSpec(name="one_cycle"),
    "augment": AugmentSpec(rotate=10, mixup=0.4),
    "ema": 0.9,
    "clip_norm": 1.0,
    "patience": 4,
}


def _setup(optimizer="adamw", *, split=HOLDOUT, epochs=7, every=2, **training):
    return Setup(
        data=DataSpec(name="digits"),
        split=split,
        model=MlpSpec(kind="mlp", hidden=16, dropout=0.3, batch_norm=True),
        training=TrainingSpec(
            epochs=epochs,
            checkpoint=every,
            precision="float32",
            optimizer=OptimizerSpec(name=optimizer, lr=0.02, momentum=0.9),
            **training,
        ),
    )


def _train(setup, card, folder, file, *, until=None):
    """Epochs and result of a training; until: it is killed after so many epochs, and has no result."""
    training = train_trial(TrialPlan(setup, card, 0, seed=5, folder=folder, device_name="cpu", checkpoint=file))
    epochs = []
    try:
        epoch = next(training)
        while True:
            epochs.append(epoch)
            if len(epochs) == until:
                training.close()
                return epochs, None
            epoch = training.send(True)
    except StopIteration as end:
        return epochs, end.value


def _untimed(epochs):
    return [dataclasses.replace(epoch, seconds=0.0) for epoch in epochs]


@pytest.fixture(scope="module", params=["sgd", "rmsprop", "adam", "adamw"])
def in_one_go(request, digits_card, tmp_path_factory):
    """A setup, and what its training gave: its epochs, its result, its folder."""
    torch.set_num_threads(1)
    setup, folder = _setup(request.param, **RICH), tmp_path_factory.mktemp("whole") / "a"
    return setup, *_train(setup, digits_card, folder, None), folder


@pytest.mark.parametrize("until", [1, 2, 3, 6])
def test_a_resumed_training_ends_bit_for_bit_as_one_in_one_go(digits_card, tmp_path, in_one_go, until):
    torch.set_num_threads(1)
    setup, whole, result, folder = in_one_go
    file = tmp_path / "saved" / "one.pt"
    _train(setup, digits_card, tmp_path / "b", file, until=until)
    torch.manual_seed(99)  # whatever else has drawn in this process
    saved = Checkpoint(file, setup, digits_card, seed=5, device_name="cpu").load()
    assert len(saved.epochs) == until - until % 2
    again, resumed = _train(setup, digits_card, tmp_path / "b", file)
    assert _untimed(again) == _untimed(whole)
    assert dataclasses.replace(resumed, folder=result.folder) == result
    first, second = (load_file(each / "weights.safetensors") for each in (folder, tmp_path / "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    first, second = (np.load(each / VALIDATION)["probabilities"] for each in (folder, tmp_path / "b"))
    assert np.array_equal(first, second)


def test_the_epochs_before_are_told_again_and_not_trained_again(digits_card, tmp_path):
    setup, file = _setup(), tmp_path / "one.pt"
    first, _ = _train(setup, digits_card, tmp_path, file, until=5)
    again, _ = _train(setup, digits_card, tmp_path, file)
    assert [epoch.number for epoch in again] == [1, 2, 3, 4, 5, 6, 7]
    assert [epoch.seconds for epoch in again[:4]] == [epoch.seconds for epoch in first[:4]]


@pytest.fixture(scope="module")
def folds(digits_card, tmp_path_factory):
    setup = _setup(split=FOLDS, epochs=3)
    return setup, *_train(setup, digits_card, tmp_path_factory.mktemp("folds"), None)


# Three epochs a fold, saved after the second of each, and between folds when the next one begins.
@pytest.mark.parametrize(("until", "kept"), [(2, 2), (3, 2), (4, 3), (5, 5), (8, 8)])
def test_finished_folds_are_not_trained_again(digits_card, tmp_path, folds, until, kept):
    (setup, whole, result), file = folds, tmp_path / "one.pt"
    first, _ = _train(setup, digits_card, tmp_path, file, until=until)
    again, resumed = _train(setup, digits_card, tmp_path, file)
    assert _untimed(again) == _untimed(whole)
    assert dataclasses.replace(resumed, folder=result.folder) == result
    assert [epoch.seconds for epoch in again[:kept]] == [epoch.seconds for epoch in first[:kept]]


def _cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def _flip(file):
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(bytes(raw))


def _empty(file):
    file.write_bytes(b"")


def _folder(file):
    file.unlink()
    file.mkdir()


@pytest.fixture(scope="module")
def saved(digits_card, tmp_path_factory):
    """The epochs of a training in one go, and the file of one that was killed in its sixth."""
    folder = tmp_path_factory.mktemp("saved")
    _train(_setup(), digits_card, folder, folder / "one.pt", until=5)
    return _train(_setup(), digits_card, folder, None)[0], folder / "one.pt"


@pytest.mark.parametrize("damage", [_cut, _flip, _empty, _folder])
def test_a_damaged_file_is_as_none(digits_card, tmp_path, saved, damage):
    setup, (whole, whole_file) = _setup(), saved
    file = Path(shutil.copy(whole_file, tmp_path))
    damage(file)
    epochs, result = _train(setup, digits_card, tmp_path, file)
    assert _untimed(epochs) == _untimed(whole)
    assert result.state is TrialState.COMPLETE


def test_a_file_of_another_training_is_as_none(digits_card, saved):
    setup, (_, file) = _setup(), saved

    def found(setup=setup, card=digits_card, seed=5):
        return Checkpoint(file, setup, card, seed=seed, device_name="cpu").load().epochs

    assert len(found()) == 4
    assert len(found(_setup(every=3))) == 4  # how often it is saved makes no other training
    assert found(_setup(epochs=8)) == ()
    assert found(seed=6) == ()
    assert found(card=dataclasses.replace(digits_card, digest="sha256:1")) == ()


def test_a_network_that_was_changed_in_between_begins_again(digits_card, saved):
    found = Checkpoint(saved[1], _setup(), digits_card, seed=5, device_name="cpu").load()
    assert not found.fits(torch.nn.Linear(2, 2))


def test_without_a_wish_nothing_is_written(digits_card, tmp_path):
    _train(_setup(every=None), digits_card, tmp_path / "left", tmp_path / "saved" / "one.pt", until=4)
    assert not (tmp_path / "saved").exists()


def test_a_disk_that_refuses_costs_the_checkpoint_not_the_training(digits_card, tmp_path):
    (tmp_path / "saved").write_text("a file where a folder should be")
    _, result = _train(_setup(), digits_card, tmp_path / "left", tmp_path / "saved" / "one.pt")
    assert result.state is TrialState.COMPLETE


def test_a_save_that_is_cut_off_leaves_the_one_before(digits_card, tmp_path, monkeypatch):
    setup, file = _setup(), tmp_path / "one.pt"
    _train(setup, digits_card, tmp_path, file, until=3)

    def killed(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        _train(setup, digits_card, tmp_path, file)
    monkeypatch.undo()
    assert len(Checkpoint(file, setup, digits_card, seed=5, device_name="cpu").load().epochs) == 2
