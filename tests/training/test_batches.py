"""Batches: turned before or now, their images are the same; while data grow, each epoch goes through its share."""

import copy
import dataclasses
import itertools

import pytest
import torch

from hpo.models import build_model
from hpo.spec.models import MlpSpec
from hpo.spec.training import AugmentSpec, OptimizerSpec, ScheduleSpec, TrainingSpec
from hpo.training import batches
from hpo.training.batches import GrowingSubset, stratified_order
from hpo.training.loop import train

FLAGS = ("flip_horizontal", "flip_vertical", "rotate90")
IMAGES = torch.randint(0, 256, (200, 6, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def _taken(spec, monkeypatch, most):
    monkeypatch.setattr(batches, "_MOST_BYTES", most)
    generator = torch.Generator().manual_seed(2)
    taken = batches.Batches(IMAGES, spec)
    places = taken.rows(torch.randperm(200), 64, generator)
    return [taken.gather(some, generator) for some in places.split(64)], generator.get_state()


@pytest.mark.parametrize("flags", list(itertools.product((False, True), repeat=3)))
@pytest.mark.parametrize("more", [{}, {"brightness": 0.3}], ids=["alone", "recoloured"])
def test_kept_turns_are_those_made_batch_by_batch(flags, more, monkeypatch):
    spec = AugmentSpec(**dict(zip(FLAGS, flags, strict=True)), **more)
    torch.manual_seed(0)
    kept, after = _taken(spec, monkeypatch, 2**28)
    torch.manual_seed(0)
    made, then = _taken(spec, monkeypatch, 0)
    assert all(torch.equal(one, other) for one, other in zip(kept, made, strict=True))
    assert torch.equal(after, then)


def test_turns_draw_what_one_change_after_the_other_drew():
    """Seeds of earlier studies give the trainings that they gave."""
    spec, generator = AugmentSpec(**dict.fromkeys(FLAGS, True)), torch.Generator().manual_seed(3)
    taken = batches.Batches(IMAGES, spec)
    new = taken.gather(taken.rows(torch.arange(200), 200, generator), generator)
    chance = torch.Generator().manual_seed(3)
    old = IMAGES
    for change in (
        lambda some: some.flip(2),
        lambda some: some.flip(1),
        lambda some: some.rot90(2, (1, 2)),
        lambda some: some.rot90(1, (1, 2)),
    ):
        chosen = torch.rand(200, generator=chance) < 0.5
        old = torch.where(chosen.view(-1, 1, 1, 1), change(old), old)
    assert torch.equal(new, old)


def test_turned_images_of_a_data_set_are_made_once():
    spec = AugmentSpec(flip_horizontal=True)
    batches.Batches(IMAGES, spec)
    before = batches._all_flipped.cache_info().misses
    batches.Batches(IMAGES, spec)
    assert batches._all_flipped.cache_info().misses == before


def test_features_are_taken_as_they_are():
    features = torch.randn(200, 5)
    taken = batches.Batches(features, AugmentSpec(flip_horizontal=True))
    assert torch.equal(taken.gather(torch.tensor([3, 1]), torch.Generator()), features[[3, 1]])


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


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (ScheduleSpec(name="step", step_epochs=3, gamma=0.1), [1, 1, 1, 0.1, 0.1, 0.1]),
        (ScheduleSpec(name="exponential", gamma=0.5), [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32]),
    ],
)
def test_schedules_that_count_epochs_count_those_of_growing_data(digits, schedule, factors):
    spec = TrainingSpec(epochs=6, data_growth=0.2, batch_size=10, checkpoint=1, schedule=schedule)
    states = {}
    epochs, _ = _train(digits, spec, save=lambda epoch, state: states.update({epoch.number: copy.deepcopy(state)}))
    assert [epoch.learning_rate / spec.optimizer.lr for epoch in epochs] == pytest.approx(factors)
    again, _ = _train(digits, spec, resume=states[3])
    assert again == epochs[3:]


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
