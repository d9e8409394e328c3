"""A whole candidate: folds, costs, groups of classes, one sigmoid output."""

import numpy as np
import pytest

from hpo.data.prepare import prepare
from hpo.errors import DataError
from hpo.records import TrialState, unpack_classes
from hpo.spec.models import CnnSpec, MlpSpec
from hpo.spec.study import DataSpec, Setup, SplitSpec
from hpo.spec.training import AugmentSpec, TrainingSpec
from hpo.training.stack import Stacks
from hpo.training.trial import TrialPlan, train_trial
from hpo.training.validation import VALIDATION

DIGITS = DataSpec(name="digits")
EVEN_ODD = {"even": ["0", "2", "4", "6", "8"], "odd": ["1", "3", "5", "7", "9"]}


def _setup(**parts):
    given = {"data": DIGITS, "split": SplitSpec(kind="holdout"), "model": MlpSpec(kind="mlp", hidden=32)}
    return Setup(**{**given, "training": TrainingSpec(epochs=3, precision="float32"), **parts})


def _train(setup, card, folder, *, verdict=lambda epoch: True, **options):
    stacks = options.pop("stacks", None)
    plan = TrialPlan(setup, card, number=0, seed=5, folder=folder, device_name="cpu", **options)
    training = train_trial(plan, stacks=stacks)
    epochs = []
    try:
        epoch = next(training)
        while True:
            epochs.append(epoch)
            epoch = training.send(verdict(epoch))
    except StopIteration as end:
        return epochs, end.value


def test_a_complete_trial_leaves_what_it_predicted(digits_card, tmp_path):
    epochs, result = _train(_setup(), digits_card, tmp_path)
    assert result.state is TrialState.COMPLETE
    assert [epoch.last for epoch in epochs] == [False, False, True]
    left = np.load(tmp_path / VALIDATION)
    predicted = left["probabilities"].argmax(1)
    assert unpack_classes(result.predicted) == predicted.tolist()
    assert np.mean(predicted == left["labels"]) == pytest.approx(result.scores["valid_accuracy"])
    assert np.array(result.confusion).sum() == len(left["rows"])
    assert result.scores["parameters"] == 64 * 32 + 32 + 32 * 10 + 10


def test_folds_train_apart_and_scores_are_their_means(digits_card, tmp_path):
    setup = _setup(split=SplitSpec(kind="kfold", folds=3, fraction=0.5))
    epochs, result = _train(setup, digits_card, tmp_path / "work")
    assert [(epoch.fold, epoch.number) for epoch in epochs] == [(f, n) for f in range(3) for n in (1, 2, 3)]
    accuracies = [fold["valid_accuracy"] for fold in result.folds]
    assert result.scores["valid_accuracy"] == pytest.approx(np.mean(accuracies))
    assert result.scores["valid_accuracy_std"] == pytest.approx(np.std(accuracies))
    assert not (tmp_path / "work").exists()
    # Each fold begins from fresh weights: its first epoch is as poor as the first fold's.
    firsts = [epoch.scores["train_accuracy"] for epoch in epochs if epoch.number == 1]
    assert max(firsts) < epochs[2].scores["train_accuracy"]


def test_a_trial_can_be_pruned_between_epochs_and_between_folds(digits_card, tmp_path):
    setup = _setup(split=SplitSpec(kind="kfold", folds=3))
    for stop in [(1, 2), (0, 3)]:
        epochs, result = _train(setup, digits_card, tmp_path, verdict=lambda e, at=stop: (e.fold, e.number) != at)
        assert result.state is TrialState.PRUNED
        assert (epochs[-1].fold, epochs[-1].number) == stop


def test_a_verdict_on_the_last_epoch_of_all_comes_too_late(digits_card, tmp_path):
    _, result = _train(_setup(), digits_card, tmp_path, verdict=lambda epoch: not epoch.last)
    assert result.state is TrialState.COMPLETE


@pytest.mark.parametrize("stacks", [None, Stacks(places=2)], ids=["alone", "stacked"])
def test_a_training_ends_with_the_epoch_that_is_good_enough(digits_card, tmp_path, stacks):
    setup = _setup(training=TrainingSpec(epochs=6, precision="float32"))
    whole, _ = _train(setup, digits_card, tmp_path / "whole")
    until = whole[2].scores["valid_accuracy"]
    assert all(epoch.scores["valid_accuracy"] < until for epoch in whole[:2])
    epochs, result = _train(setup, digits_card, tmp_path / "short", until=until, stacks=stacks)
    assert [epoch.last for epoch in epochs if epoch] == [False, False, True]
    assert (result.state, result.best_epoch) == (TrialState.COMPLETE, 3)
    left = np.load(tmp_path / "short" / VALIDATION)
    assert np.mean(left["probabilities"].argmax(1) == left["labels"]) == pytest.approx(until), "its weights are kept"


def test_a_network_that_is_too_large_is_not_trained(digits_card, tmp_path):
    epochs, result = _train(_setup(), digits_card, tmp_path, most_parameters=1000)
    assert epochs == []
    assert result.state is TrialState.PRUNED
    assert "2410 parameters" in result.reason
    assert result.scores == {"parameters": 2410.0}


def test_latency_is_measured_on_request(digits_card, tmp_path):
    _, result = _train(_setup(training=TrainingSpec(epochs=1)), digits_card, tmp_path, latency=True)
    assert 0 < result.scores["latency_ms"] < 100


def test_without_validation_the_last_epoch_is_kept(digits_card, tmp_path):
    epochs, result = _train(_setup(split=SplitSpec(kind="none")), digits_card, tmp_path)
    assert result.best_epoch == len(epochs) == 3
    assert "valid_accuracy" not in result.scores
    assert (tmp_path / "weights.safetensors").is_file()


@pytest.mark.parametrize(
    "model", [MlpSpec(kind="mlp", hidden=32), CnnSpec(kind="cnn", filters=8)], ids=lambda m: m.kind
)
def test_groups_of_classes_make_a_binary_task_of_one_output(model, tmp_path):
    data = DIGITS.model_copy(update={"groups": EVEN_ODD})
    card = prepare(data, SplitSpec(kind="holdout"), cache=tmp_path / "cache")
    assert card.class_names == ("even", "odd")
    setup = _setup(data=data, model=model, task="binary", training=TrainingSpec(epochs=4))
    _, result = _train(setup, card, tmp_path / "work")
    assert result.scores["valid_accuracy"] > 0.8
    plain = _train(setup.model_copy(update={"task": "multiclass"}), card, tmp_path / "plain")[1]
    assert plain.parameter_count > result.parameter_count


def test_images_of_classes_in_no_group_are_left_out(tmp_path, digits_card):
    data = DIGITS.model_copy(update={"groups": {"zero": ["0"], "one": ["1"]}})
    card = prepare(data, SplitSpec(kind="holdout"), cache=tmp_path)
    assert card.development_count < digits_card.development_count / 4
    assert card.digest != digits_card.digest


@pytest.mark.parametrize(
    ("groups", "says"), [({"a": ["0"], "b": ["ten"]}, "'ten'"), ({"a": ["0"], "b": ["0"]}, "two groups")]
)
def test_groups_of_unknown_or_shared_classes_are_refused(groups, says, tmp_path):
    with pytest.raises(DataError, match=says):
        prepare(DIGITS.model_copy(update={"groups": groups}), SplitSpec(kind="holdout"), cache=tmp_path)


def test_mixed_images_train_and_leave_validation_alone(digits_card, tmp_path):
    training = TrainingSpec(epochs=6, augment=AugmentSpec(mixup=0.4, cutmix=1.0), precision="float32")
    _, result = _train(_setup(training=training), digits_card, tmp_path)
    assert result.scores["valid_accuracy"] > 0.75


def test_only_a_measured_precision_answers_for_others(digits_card, tmp_path):
    known = []
    for precision in ("bfloat16", "auto"):
        stacks = Stacks(2)
        setup = _setup(training=TrainingSpec(epochs=1, precision=precision))
        result = _train(setup, digits_card, tmp_path / precision, stacks=stacks)[-1]
        known.append(("precision_key" in result.settings, len(stacks.precisions)))
    assert known == [(False, 0), (True, 1)]
