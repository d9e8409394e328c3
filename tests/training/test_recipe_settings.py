"""Whitened first layers, alternating flips, growing images and warm restarts do what the study file says of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from digits_fixtures import digits, digits_card, few  # noqa: F401
from hpo.errors import SpecError
from hpo.models import build_model
from hpo.models.basic import Whitening, whitening_of
from hpo.spec.load import parse_study
from hpo.spec.models import ConvnetSpec, ResnetSpec
from hpo.spec.study import DataSpec, Setup, SplitSpec
from hpo.spec.training import AugmentSpec, ScheduleSpec, TrainingSpec
from hpo.training import step_graph
from hpo.training.batches import Batches
from hpo.training.loop import train
from hpo.training.optimizers import learning_rate_factor
from hpo.training.stack import Stacks
from hpo.training.stack_layers import unstackable_reason
from hpo.training.trial import build_full

CONVNET = ConvnetSpec(kind="convnet", filters=[8, 16], head="global", whiten=2)


@pytest.mark.parametrize("side", [2, 3])
def test_whitened_maps_are_uncorrelated_and_equal(side):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, 3, 12, 12, generator=generator)
    images = noise + 2 * noise.roll(1, 3) + noise.flip(1)  # correlated along rows and over channels
    layer = Whitening(3, side)
    layer.fit(images, floor=0.0)
    maps = layer(images).detach()
    count = 3 * side**2
    assert maps.shape == (200, 2 * count, 13 - side, 13 - side)
    flat = maps[:, :count].permute(0, 2, 3, 1).reshape(-1, count).double()
    torch.testing.assert_close(flat.T @ flat / len(flat), torch.eye(count, dtype=torch.float64), atol=1e-3, rtol=0)
    torch.testing.assert_close(maps[:, count:], -maps[:, :count])


@pytest.mark.parametrize("model", [CONVNET, ResnetSpec(kind="resnet", blocks=1, width=8, whiten=2)])
def test_a_trial_computes_the_layer_from_training_images_and_never_trains_it(model, digits_card):  # noqa: F811
    setup = Setup(data=DataSpec(name="digits"), split=SplitSpec(kind="holdout"), model=model, training=TrainingSpec())
    net, data = build_full(setup, digits_card, seed=0, device_name="cpu")
    layer = whitening_of(net)
    assert layer is not None
    before = layer.weight.clone()
    assert before.abs().sum() > 0
    other, _ = build_full(setup, digits_card, seed=1, device_name="cpu")
    assert torch.equal(whitening_of(other).weight, before)
    spec = TrainingSpec(epochs=2, batch_size=64, ema=0.9)
    few_rows = replace(data, train=data.train[:200], valid=data.valid[:100])
    epochs = list(train(net, few_rows, spec, seed=0, precision="float32"))
    assert epochs[-1].scores["train_loss"] < epochs[0].scores["train_loss"]
    assert torch.equal(layer.weight, before)
    assert layer.bias.abs().sum() > 0
    assert "Whitening" in unstackable_reason(net, data, spec)


MIRRORED = AugmentSpec(flip_horizontal=True, alternate_flips=True)


@pytest.mark.parametrize("augment", [MIRRORED, MIRRORED.model_copy(update={"crop": 1})], ids=["rows", "computed"])
@pytest.mark.parametrize("stored", [True, False])
def test_every_second_epoch_shows_the_other_side_of_each_image(augment, stored, monkeypatch):
    from hpo.training import batches

    monkeypatch.setattr(batches, "_MOST_BYTES", 2**28 if stored else 0)
    if augment.crop:
        monkeypatch.setattr(batches, "build_augment", lambda _: lambda images, _: images)
    images = torch.randint(256, (40, 5, 5, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    taken, generator = Batches(images, augment, seed=3), torch.Generator().manual_seed(1)
    order, seen = torch.randperm(40), []
    for epoch in (1, 2, 3):
        rows = taken.rows(order, 16, generator, epoch=epoch)
        seen.append(torch.cat([taken.gather(part, generator) for part in rows.split(16)]))
    first, second, third = seen
    assert torch.equal(second, first.flip(2))
    assert torch.equal(third, first)
    plain = (first == images[order]).flatten(1).all(1)
    assert 8 < int(plain.sum()) < 32
    if stored:
        other = Batches(images, augment, seed=4)
        assert not torch.equal(other.gather(other.rows(order, 40, generator), generator), first)


def test_other_flips_are_drawn_next_to_alternating_ones():
    spec = AugmentSpec(flip_horizontal=True, alternate_flips=True, flip_vertical=True, rotate90=True)
    images = torch.arange(16, dtype=torch.uint8).view(1, 4, 4, 1).expand(64, -1, -1, -1).contiguous()
    taken, generator = Batches(images, spec), torch.Generator().manual_seed(0)
    seen = taken.gather(taken.rows(torch.arange(64), 64, generator, epoch=1), generator)
    assert len({image.numpy().tobytes() for image in seen}) == 8


def test_images_grow_to_their_size_in_two_thirds_of_the_epochs():
    spec = TrainingSpec(epochs=9, first_size=0.5)
    shares = [spec.size_of(epoch) for epoch in range(1, 10)]
    np.testing.assert_allclose(shares, [0.5, 0.6, 0.7, 0.8, 0.9, 1, 1, 1, 1])
    assert TrainingSpec(epochs=1, first_size=0.5).size_of(1) == 0.5


def test_a_training_with_growing_images_is_resumed_exactly_and_sees_small_ones_first(few, tmp_path):  # noqa: F811
    model = CONVNET.model_copy(update={"whiten": 0})
    spec = TrainingSpec(epochs=4, batch_size=64, first_size=0.5, checkpoint=1)
    net, seen = build_model(model, image_shape=(8, 8, 1), classes=10, seed=0), []
    net.register_forward_pre_hook(lambda module, inputs: seen.append((module.training, inputs[0].shape[2])))
    whole = [
        epoch.scores
        for epoch in train(
            net,
            few,
            spec,
            seed=0,
            precision="float32",
            save=lambda epoch, state: torch.save(state, tmp_path / f"{epoch.number}"),
        )
    ]
    assert list(dict.fromkeys(side for training, side in seen if training)) == [4, 6, 8]
    assert {side for training, side in seen if not training} == {8}
    again = build_model(model, image_shape=(8, 8, 1), classes=10, seed=7)
    state = torch.load(tmp_path / "1", weights_only=True)
    rest = [epoch.scores for epoch in train(again, few, spec, seed=0, precision="float32", resume=state)]
    assert rest == whole[1:]


def test_growing_images_are_neither_stacked_nor_captured(few, monkeypatch):  # noqa: F811
    net = build_model(CONVNET.model_copy(update={"whiten": 0}), image_shape=(8, 8, 1), classes=10, seed=0)
    spec = TrainingSpec(epochs=60, batch_size=64, first_size=0.5)
    monkeypatch.setattr(step_graph, "_ON", "cpu")
    monkeypatch.setattr(step_graph, "_FEWEST", 1)
    assert unstackable_reason(net, few, spec) == step_graph.why_not(net, few, spec, own=False) == "its images grow"


@pytest.mark.parametrize(
    "model",
    [
        {"kind": "mlp"},
        {"kind": "cnn"},
        {"kind": "convnet"},
        {"kind": "timm", "name": "resnet18"},
    ],
    ids=lambda model: model["kind"],
)
def test_networks_of_one_size_refuse_growing_images(model):
    tree = {
        "name": "s",
        "data": {"name": "digits"},
        "split": {"kind": "holdout"},
        "model": model,
        "search": {"space": {"training.first_size": {"choice": [0.5, 1.0]}}},
    }
    with pytest.raises(SpecError, match="takes images of one size"):
        parse_study(tree, trust=True)
    tree["search"] = {"space": {"training.optimizer.lr": {"float": [0.1, 1.0]}}}
    with pytest.raises(SpecError, match="takes images of one size"):
        parse_study({**tree, "training": {"first_size": 0.5}}, trust=True)


def test_a_cosine_returns_to_its_highest_rate_at_each_restart():
    spec = ScheduleSpec(name="cosine", restarts=2, period_growth=2.0)
    factors = [learning_rate_factor(spec, step=step, steps=70, epoch=step // 10) for step in range(70)]
    highest = [step for step, factor in enumerate(factors) if factor > 0.999]
    assert highest == [0, 10, 11, 30, 31] or highest == [0, 10, 30]
    assert all(factors[step - 1] < 0.03 for step in (10, 30))
    assert factors[-1] < 0.01
    plain = ScheduleSpec(name="cosine")
    expected = [0.5 * (1 + np.cos(np.pi * step / 70)) for step in range(70)]
    found = [learning_rate_factor(plain, step=step, steps=70, epoch=step // 10) for step in range(70)]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_restarts_and_alternating_flips_share_a_stack_and_train_as_alone(few):  # noqa: F811
    model = ConvnetSpec(kind="convnet", filters=[4], batch_norm=False)
    spec = TrainingSpec(epochs=3, batch_size=64, augment=MIRRORED, schedule=ScheduleSpec(name="cosine", restarts=1))
    nets = [build_model(model, image_shape=(8, 8, 1), classes=10, seed=seed) for seed in (0, 1)]
    alone = [epoch.scores for epoch in train(nets[0], few, spec, seed=5, precision="float32")]
    nets[0] = build_model(model, image_shape=(8, 8, 1), classes=10, seed=0)
    stacks = Stacks(2)
    fits = [stacks.join(net, few, spec, seed=seed, precision="float32") for net, seed in zip(nets, (5, 6), strict=True)]
    together = []
    for _ in range(3):
        for fit in fits:
            assert next(fit) is None
        first, _ = [next(fit) for fit in fits]
        together.append(first.scores)
    for one, other in zip(alone, together, strict=True):
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-3)
