"""Trainings in a stack give what each of them gives alone."""

from dataclasses import replace

import pytest
import torch

from hpo.errors import TrainingError
from hpo.models import build_model
from hpo.models.basic import ACTIVATIONS
from hpo.spec.models import MlpSpec, ResnetSpec
from hpo.spec.training import AugmentSpec, OptimizerSpec, ScheduleSpec
from hpo.training.loop import train
from hpo.training.optimizers import OPTIMIZERS
from hpo.training.stack import Stack, Stacks, alongside
from hpo.training.stack_layers import BrokenStackError, UnstackableError, key_of
from hpo.training.stack_nets import StackedNets
from hpo.training.stack_speed import step_seconds
from side_by_side import agree, alone, stacked, training


def _net(seed, *, binary=False, **fields):
    model = MlpSpec(**{"kind": "mlp", "hidden": 24, **fields})
    return build_model(model, image_shape=(8, 8, 1), classes=2 if binary else 10, seed=seed, binary=binary)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_as_it_does_alone(few, name, batch_norm):
    makers = [
        (
            lambda seed, width=width: _net(seed, hidden=[width, 12], batch_norm=batch_norm),
            training(optimizer=OptimizerSpec(name=name, lr=rate, momentum=0.5, weight_decay=1e-2), clip_norm=1.0),
        )
        for width, rate in ((8, 1e-3), (24, 3e-3), (24, 1e-2))
    ]
    # A bias before batch norm has no gradient but rounding, which Adam takes for one: running means drift a little.
    agree(alone(makers, few), stacked(makers, few), tolerance=1e-2 if batch_norm else 2e-4)


def test_optimizers_activations_widths_and_dropouts_mix_in_one_stack(few):
    makers = [
        (
            lambda seed, activation=activation: _net(
                seed, activation=activation, hidden=8 + 4 * seed, dropout=0.1 * (seed % 3)
            ),
            training(
                optimizer=OptimizerSpec(name=list(OPTIMIZERS)[place % 4], lr=1e-3 * (1 + place)),
                label_smoothing=0.02 * place,
            ),
        )
        for place, activation in enumerate(ACTIVATIONS)
    ]
    agree(alone(makers, few), stacked(makers, few))


@pytest.mark.parametrize(
    "fields",
    [
        {"class_weights": "balanced", "label_smoothing": 0.1},
        {"augment": AugmentSpec(shift=0.1)},
        {"augment": AugmentSpec(mixup=0.5)},
        {"ema": 0.9},
        {"schedule": ScheduleSpec(name="one_cycle")},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_a_training_may_ask_for_works_in_a_stack(few, fields):
    makers = [(_net, training(**fields)), (_net, training(epochs=3, **fields))]
    agree(alone(makers, few), stacked(makers, few))


def test_members_come_and_go_without_a_trace_on_the_others(few):
    makers = [
        (lambda seed, width=width: _net(seed, hidden=width, dropout=0.2), training(epochs=epochs))
        for width, epochs in ((16, 3), (40, 1), (8, 4), (64, 2))
    ]
    agree(alone(makers, few), stacked(makers, few, joins=[0, 0, 1, 2]))


def test_early_stopping_and_the_kept_epoch_are_each_member_s_own(few):
    makers = [(_net, training(epochs=12, patience=1, optimizer=OptimizerSpec(lr=rate))) for rate in (1e-3, 3e-2, 0.3)]
    agree(alone(makers, few), stacked(makers, few), tolerance=5e-3)


def test_a_member_that_diverges_ends_alone(few):
    stack = Stack(precision="float32")
    wild = stack.join(_net(0), few, training(optimizer=OptimizerSpec(name="sgd", lr=100.0), epochs=3), seed=0)
    calm_net = _net(1)
    calm = stack.join(calm_net, few, training(epochs=3), seed=1)
    epochs = []
    for _ in range(3):
        pending = [next(calm)]
        try:
            pending.append(next(wild))
            if pending[-1] is None:
                next(wild)
        except (TrainingError, StopIteration):
            pass
        epochs.append(next(calm))
    expected = list(train(_net(1), few, training(epochs=3), seed=1, precision="float32"))
    for one, other in zip(expected, epochs, strict=True):
        assert other.scores["valid_loss"] == pytest.approx(one.scores["valid_loss"], abs=1e-4)


def test_a_closed_member_leaves_and_the_others_go_on(few):
    stack = Stack(precision="float32")
    first = stack.join(_net(0), few, training(epochs=3), seed=0)
    second = stack.join(_net(1), few, training(epochs=3), seed=1)
    assert (next(first), next(second)) == (None, None)
    assert (next(first).number, next(second).number) == (1, 1)
    first.close()
    assert next(second) is None
    assert next(second).number == 2


def test_padding_stays_zero_under_every_optimizer(few):
    for name in OPTIMIZERS:
        stack = Stack(precision="float32")
        optimizer = OptimizerSpec(name=name, lr=1e-2, momentum=0.9, weight_decay=0.1)
        nets = [_net(seed, hidden=width, activation="sigmoid", batch_norm=True) for seed, width in enumerate((5, 20))]
        members = [stack.join(net, few, training(optimizer=optimizer), seed=0) for net in nets]
        assert [next(member) for member in members] == [None, None]
        assert all(next(member).number == 1 for member in members)
        hidden, last = stack._stacked.layers
        row = last.widths.index(5)
        assert not hidden.weight[row, :, 5:].any()
        assert not hidden.bias[row, 5:].any()
        assert not last.weight[row, 5:].any()
        for member in members:
            member.close()


def test_what_cannot_be_stacked_says_why(few):
    resnet = build_model(ResnetSpec(kind="resnet", width=4), image_shape=(8, 8, 1), classes=10, seed=0)
    with pytest.raises(UnstackableError, match="a layer ResidualBlock"):
        key_of(resnet, few, training(), "float32")
    with pytest.raises(UnstackableError, match="in pieces"):
        key_of(_net(0), few, training(micro_batch=8), "float32")
    same = key_of(_net(0, hidden=8), few, training(), "float32")
    assert same == key_of(_net(1, hidden=15, activation="tanh"), few, training(epochs=9), "float32")
    assert same != key_of(_net(0, hidden=16), few, training(), "float32")  # half of each product would be padding
    assert same != key_of(_net(0, hidden=[8, 8]), few, training(), "float32")
    assert same != key_of(_net(0, hidden=8), few, training(batch_size=16), "float32")


def test_networks_own_their_weights_again_when_a_stack_is_gone():
    nets = [_net(seed, hidden=width) for seed, width in enumerate((6, 9))]
    before = [{name: value.clone() for name, value in net.state_dict().items()} for net in nets]
    StackedNets(nets).release()
    for net, expected in zip(nets, before, strict=True):
        assert all(
            value.is_contiguous() and torch.equal(value, expected[name]) for name, value in net.state_dict().items()
        )


def test_bfloat16_stacks_learn_as_float32_ones_do(few):
    makers = [(lambda seed: _net(seed, hidden=24), training(epochs=3)) for _ in range(3)]
    plain, half = stacked(makers, few), stacked(makers, few, precision="bfloat16")
    for (expected, *_), (found, *_) in zip(plain, half, strict=True):
        assert found[-1].scores["train_loss"] != expected[-1].scores["train_loss"]
        assert found[-1].scores["train_loss"] == pytest.approx(expected[-1].scores["train_loss"], rel=0.03)
        assert found[-1].scores["valid_accuracy"] == pytest.approx(expected[-1].scores["valid_accuracy"], abs=0.05)


def test_a_failure_in_the_shared_computation_is_told_to_each(few, monkeypatch):
    stack = Stack(precision="float32")
    members = [stack.join(_net(seed), few, training(), seed=seed) for seed in range(2)]
    assert [next(member) for member in members] == [None, None]
    monkeypatch.setattr(StackedNets, "forward", lambda *_, **__: (_ for _ in ()).throw(MemoryError("no room")))
    for member in members:
        with pytest.raises(BrokenStackError, match="MemoryError: no room") as error:
            next(member)
        assert error.value.__context__ is None  # nothing holds on to what was computed
    assert stack.members == []


def test_trainings_of_a_process_find_each_other_and_folds_do_not(few):
    stacks = Stacks(4)
    other = replace(few, train=few.train.flip(0))  # as many rows of the same images
    begun = []
    for seed, data in enumerate([few, few, other]):
        member = stacks.join(_net(seed), data, training(), seed=seed, precision="float32")
        begun.append((member, next(member)))
    assert [waits for _, waits in begun] == [None, None, None]
    seconds = [next(member).seconds for member, _ in begun]
    assert seconds[0] == seconds[1] != seconds[2]  # one computation


def test_a_training_beside_others_draws_what_it_draws_alone(few):
    def fit(seed):
        return train(_net(seed, dropout=0.5), few, training(epochs=3), seed=seed, precision="float32")

    expected = [[epoch.scores for epoch in fit(seed)] for seed in range(2)]
    state = torch.get_rng_state()
    pair = [alongside(fit(seed), torch.device("cpu")) for seed in range(2)]
    found = list(zip(*pair, strict=True))
    assert [[epoch.scores for epoch in one] for one in zip(*found, strict=True)] == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_measuring_a_step_leaves_the_network_and_chance_as_they_were(few):
    net, spec = _net(0), training()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    seconds = [step_seconds(net, few, spec, together=count, precision="float32") for count in (1, 4)]
    assert all(0 < each < 1 for each in seconds)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
