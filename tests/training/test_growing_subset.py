"""Which images an epoch goes through while their share grows, and that a training with them resumes as any other."""

import copy
import dataclasses
import itertools

import pytest
import torch

from hpo.models import build_model
from hpo.spec.models import MlpSpec
from hpo.spec.training import OptimizerSpec, ScheduleSpec, TrainingSpec
from hpo.training.batches import GrowingSubset, stratified_order
from hpo.training.loop import train


def _train(digits, spec, *, seed=0, resume=None, save=None):
    model = MlpSpec(kind="mlp", hidden=16, dropout=0.2)
    net = build_model(model, image_shape=tuple(digits.images.shape[1:]), classes=10, seed=seed)
    epochs = list(train(net, digits, spec, seed=seed, precision="float32", resume=resume, save=save))
    return [dataclasses.replace(epoch, seconds=0.0) for epoch in epochs], net


def test_every_beginning_of_the_order_has_the_class_shares():
    labels = torch.tensor([0] * 600 + [1] * 300 + [2] * 90 + [3] * 10)[torch.randperm(1000)]
    order = stratified_order(labels, seed=3)
    assert order.sort().values.tolist() == list(range(1000))
    for count in (10, 50, 111, 333, 999):
        found = labels[order[:count]].bincount(minlength=4)
        wanted = count * labels.bincount() / 1000
        assert (found - wanted).abs().max() <= 2


def test_the_images_of_an_epoch_are_among_those_of_every_later_one(digits):
    spec = TrainingSpec(epochs=5, data_growth=0.3, batch_size=32)
    rows = GrowingSubset(digits, spec, seed=1)
    parts = [set(rows.of(epoch).tolist()) for epoch in range(1, 6)]
    assert [len(part) for part in parts] == [round(share * len(digits.train)) for share in (0.3, 0.6, 0.9, 1, 1)]
    assert all(first <= second for first, second in itertools.pairwise(parts))
    assert parts[-1] == set(digits.train.tolist())
    assert set(GrowingSubset(digits, spec, seed=1).of(1).tolist()) == parts[0]
    assert set(GrowingSubset(digits, spec, seed=2).of(1).tolist()) != parts[0]


def test_data_that_do_not_grow_are_the_training_rows_as_they_stand(digits):
    rows = GrowingSubset(digits, TrainingSpec(batch_size=100), seed=1)
    assert torch.equal(rows.of(1), digits.train)
    assert rows.batches(3) == 3 * -(-len(digits.train) // 100)


def test_an_epoch_has_an_image_at_least(digits):
    epochs, _ = _train(digits, TrainingSpec(epochs=2, data_growth=1e-6))
    assert len(epochs) == 2


def test_short_epochs_cost_what_they_go_through(digits):
    spec = TrainingSpec(epochs=6, data_growth=0.25, batch_size=10)
    assert [spec.share(epoch) for epoch in range(1, 7)] == [0.25, 0.5, 0.75, 1, 1, 1]
    rows = GrowingSubset(digits, spec, seed=0)
    assert rows.batches(6) == sum(-(-len(rows.of(epoch)) // 10) for epoch in range(1, 7))


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_the_schedule_ends_with_the_last_batch_of_growing_data(digits, schedule):
    spec = TrainingSpec(epochs=6, data_growth=0.2, schedule=ScheduleSpec(name=schedule))
    epochs, _ = _train(digits, spec)
    assert epochs[-1].learning_rate < 0.01 * spec.optimizer.lr


def test_a_training_with_growing_data_resumes_bit_for_bit(digits):
    spec = TrainingSpec(
        epochs=6,
        data_growth=0.2,
        checkpoint=1,
        optimizer=OptimizerSpec(lr=0.01),
        schedule=ScheduleSpec(name="one_cycle"),
    )
    states = {}
    whole, net = _train(digits, spec, save=lambda epoch, state: states.update({epoch.number: copy.deepcopy(state)}))
    again, other = _train(digits, spec, resume=states[2])
    assert again == whole[2:]
    assert all(torch.equal(first, second) for first, second in zip(net.parameters(), other.parameters(), strict=True))
