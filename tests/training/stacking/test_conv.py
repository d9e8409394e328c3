"""Convolutions in a stack give what each of them gives alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hpo.models import build_model
from hpo.models.basic import ACTIVATIONS
from hpo.spec.models import CnnSpec, ConvnetSpec
from hpo.spec.study import DataSpec, Setup, SplitSpec
from hpo.spec.training import AugmentSpec, OptimizerSpec
from hpo.training.optimizers import OPTIMIZERS
from hpo.training.stack import Stack, Stacks
from hpo.training.stack_layers import key_of
from hpo.training.stack_nets import StackedNets
from hpo.training.stack_speed import why_slower_stacked
from hpo.training.trial import TrialPlan, build
from side_by_side import agree, alone, stacked, training


def _net(seed, *, binary=False, **fields):
    kind = ConvnetSpec if "depth" in fields else CnnSpec
    model = kind(**{"kind": "cnn" if kind is CnnSpec else "convnet", **fields})
    return build_model(model, image_shape=(8, 8, 1), classes=2 if binary else 10, seed=seed, binary=binary)


def _deep(seed, **fields):
    small = {"depth": 2, "width": 4, "growth": 1.0, "batch_norm": False, "dense": [12]}
    return _net(seed, **small | fields)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_convolutions_as_it_does_alone(few, name, batch_norm):
    makers = [
        (
            lambda seed, filters=filters: _net(seed, filters=filters, batch_norm=batch_norm),
            training(optimizer=OptimizerSpec(name=name, lr=rate, momentum=0.5, weight_decay=1e-2), clip_norm=1.0),
        )
        for filters, rate in ((4, 1e-3), (7, 3e-3), (7, 1e-2))
    ]
    # A bias before batch norm has no gradient but rounding, which Adam takes for one: running means drift a little.
    agree(alone(makers, few), stacked(makers, few), tolerance=1e-2 if batch_norm else 5e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {"kernel": 2},
        {"kernel": 5, "padding": "valid"},
        {"pool": 1},
        {"pool": 3, "pool_type": "average"},
        {"pool": "global"},
        {"pool": "global", "pool_type": "average"},
        {"dropout": 0.3},
        {"depth": 2, "width": 5, "convs_per_block": 2},
        {"depth": 2, "pool": "stride", "head": "global"},
        {"depth": 2, "pool": "none", "dropout": 0.2, "head": "global", "dense": [9], "dense_dropout": 0.2},
        {"depth": 2, "pool": "average", "padding": ["valid", "same"], "batch_norm": False, "dropout": (0.1, 0.3)},
    ],
    ids=str,
)
def test_every_kind_of_block_is_computed_as_it_is_alone(few, fields):
    plain = OptimizerSpec(name="sgd", lr=0.03, momentum=0.5)  # rounding stays what it is
    makers = [(lambda seed: _net(seed, **fields), training(epochs=epochs, optimizer=plain)) for epochs in (2, 3)]
    agree(alone(makers, few), stacked(makers, few), tolerance=1e-4)


def test_activations_filters_dropouts_and_optimizers_mix_in_one_stack(few):
    makers = [
        (
            lambda seed, activation=activation: _deep(
                seed, activation=activation, filters=[4 + seed % 4, 7 - seed % 3], dropout=0.1 * (seed % 3)
            ),
            training(optimizer=OptimizerSpec(name=list(OPTIMIZERS)[place % 4], lr=1e-3 * (1 + place))),
        )
        for place, activation in enumerate(ACTIVATIONS)
    ]
    agree(alone(makers, few), stacked(makers, few), tolerance=5e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {"class_weights": "balanced", "label_smoothing": 0.1},
        {"augment": AugmentSpec(flip_horizontal=True)},
        {"augment": AugmentSpec(shift=0.1)},
        {"augment": AugmentSpec(cutmix=0.5)},
        {"ema": 0.9},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_a_training_may_ask_for_works_with_convolutions(few, fields):
    makers = [(lambda seed: _net(seed, filters=4 + seed), training(**fields)) for _ in range(2)]
    agree(alone(makers, few), stacked(makers, few), tolerance=5e-4)


def test_running_statistics_of_narrower_networks_are_their_own(few):
    plain = OptimizerSpec(name="sgd", lr=0.03)
    makers = [
        (
            lambda seed, filters=filters: _deep(seed, filters=filters, batch_norm=True, activation="sigmoid"),
            training(optimizer=plain, ema=ema),
        )
        for filters, ema in (([4, 5], 0.0), ([7, 4], 0.9), ([5, 7], 0.0))
    ]
    agree(alone(makers, few), stacked(makers, few), tolerance=1e-4)


def test_networks_of_one_logit_convolve_in_a_stack_too(few):
    two = replace(few, labels=few.labels % 2, class_names=("even", "odd"))
    makers = [(lambda seed: _net(seed, binary=True, filters=4 + seed), training()) for _ in range(2)]
    agree(alone(makers, two), stacked(makers, two), tolerance=5e-4)


def test_convolutions_come_and_go_and_keep_their_moments_under_another_padding(few):
    makers = [
        (lambda seed, filters=filters: _net(seed, filters=filters, dropout=0.2), training(epochs=epochs))
        for filters, epochs in ((5, 3), (7, 1), (4, 4), (6, 2))
    ]
    agree(alone(makers, few), stacked(makers, few, joins=[0, 0, 1, 2]), tolerance=5e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_padded_filters_stay_zero(few, name):
    stack = Stack(precision="float32")
    optimizer = OptimizerSpec(name=name, lr=1e-2, momentum=0.9, weight_decay=0.1)
    nets = [
        _deep(seed, filters=[width, width], activation="sigmoid", batch_norm=True) for seed, width in enumerate((4, 7))
    ]
    members = [stack.join(net, few, training(optimizer=optimizer), seed=0) for net in nets]
    assert [next(member) for member in members] == [None, None]
    assert all(next(member).number == 1 for member in members)
    for number, stage in enumerate(stack._stacked.maps.stages):
        row = stage.widths.index(4)
        padded = [stage.weight[row, 4:], stage.bias[row, 4:], stage.norm.scale[row, 4:], stage.norm.shift[row, 4:]]
        padded += [stage.weight[row, :, 4:]] * number
        assert all(part.numel() and not part.any() for part in padded)
    assert not stack._stacked.layers[0].weight[row, 4 * 2 * 2 :].any()
    for member in members:
        member.close()


def test_bfloat16_convolutions_learn_as_float32_ones_do(few):
    makers = [(lambda seed: _net(seed, filters=8, batch_norm=True), training(epochs=3)) for _ in range(3)]
    plain, half = stacked(makers, few), stacked(makers, few, precision="bfloat16")
    for (expected, *_), (found, *_) in zip(plain, half, strict=True):
        assert found[-1].scores["train_loss"] != expected[-1].scores["train_loss"]
        assert found[-1].scores["train_loss"] == pytest.approx(expected[-1].scores["train_loss"], rel=0.05)
        assert found[-1].scores["valid_accuracy"] == pytest.approx(expected[-1].scores["valid_accuracy"], abs=0.05)


def test_convolutions_share_where_kernels_pooling_and_about_their_filters_agree(few):
    def key(**fields):
        return key_of(_net(0, **fields), few, training(), "float32")

    same = key(filters=8)
    assert same == key(filters=15, activation="tanh", dropout=0.5)
    for other in ({"filters": 16}, {"kernel": 5}, {"padding": "valid"}, {"pool": 4}, {"pool_type": "average"}):
        assert same != key(**{"filters": 8} | other), other
    assert same != key(filters=8, batch_norm=True)


def test_convolutions_own_their_weights_again_when_a_stack_is_gone():
    nets = [_net(seed, filters=filters, batch_norm=True) for seed, filters in enumerate((4, 6))]
    before = [{name: value.clone() for name, value in net.state_dict().items()} for net in nets]
    StackedNets(nets).release()
    for net, expected in zip(nets, before, strict=True):
        assert all(
            value.is_contiguous() and torch.equal(value, expected[name]) for name, value in net.state_dict().items()
        )


def test_convolutions_are_measured_once_for_a_process_and_stay_alone_where_that_is_faster(digits_card, monkeypatch):
    asked = []

    def why(net, data, spec):
        asked.append(net)
        return "too large" if len(asked) == 1 else ""

    monkeypatch.setattr("hpo.training.trial.why_slower_stacked", why)
    stacks = Stacks(4)

    def made(filters, places=stacks):
        model = CnnSpec(kind="cnn", filters=filters)
        setup = Setup(
            data=DataSpec(name="digits"),
            split=SplitSpec(kind="holdout"),
            model=model,
            training=training(precision="float32"),
        )
        return build(TrialPlan(setup, digits_card, 0, 0, Path(), "cpu"), stacks=places)

    assert [made(filters).not_stacked for filters in (8, 8, 64, 64)] == ["too large", "too large", "", ""]
    assert [made(filters).key.endswith("in a stack") for filters in (8, 64)] == [False, True]
    assert len(asked) == 2
    assert made(8, places=Stacks(1)).not_stacked == ""  # as one that was trained in a stack is trained again
    assert len(asked) == 2


def test_why_convolutions_stay_alone_names_what_was_measured(few, monkeypatch):
    seconds = {1: 1e-3, 4: 2e-3}
    monkeypatch.setattr("hpo.training.stack_speed.step_seconds", lambda *_, together, **__: seconds[together])
    assert why_slower_stacked(_net(0), few, training()) == "side by side it is 0.50 times as fast as alone here"
    seconds[4] = 5e-4
    assert why_slower_stacked(_net(0), few, training()) == ""
    seconds[1] = 5e-3
    assert why_slower_stacked(_net(0), few, training()) == "a step takes 5.0 ms, all of it computing"
