"""The same trainings alone and in a stack, and whether they agree."""

import pytest
import torch

from hpo.spec.training import OptimizerSpec, TrainingSpec
from hpo.training.loop import predict_logits, train
from hpo.training.stack import Stack


def training(**fields):
    return TrainingSpec(**{"epochs": 2, "batch_size": 32, "optimizer": OptimizerSpec(lr=3e-3), **fields})


def alone(makers, data):
    """Epochs, final logits and running statistics of each training, one after the other."""
    found = []
    for seed, (make, spec) in enumerate(makers):
        net = make(seed)
        epochs = list(train(net, data, spec, seed=seed, precision="float32"))
        found.append((epochs, predict_logits(net, data, data.valid, precision="float32"), _running(net)))
    return found


def stacked(makers, data, *, joins=None, precision="float32"):
    """The same from one stack; joins says in which round each member comes in."""
    stack = Stack(precision=precision)
    nets = [make(seed) for seed, (make, _) in enumerate(makers)]
    members = [
        stack.join(net, data, spec, seed=seed) for seed, (net, (_, spec)) in enumerate(zip(nets, makers, strict=True))
    ]
    epochs = [[] for _ in makers]
    live, waiting, number = set(), dict(enumerate(joins or [0] * len(makers))), 0
    while live or waiting:
        live |= {member for member, at in waiting.items() if at <= number}
        waiting = {member: at for member, at in waiting.items() if at > number}
        assert all(next(members[member]) is None for member in live)
        for member in sorted(live):
            epochs[member].append(next(members[member]))
            if epochs[member][-1].last:
                assert list(members[member]) == []
                live.discard(member)
        number += 1
    return [
        (each, predict_logits(net, data, data.valid, precision="float32"), _running(net))
        for each, net in zip(epochs, nets, strict=True)
    ]


def _running(net):
    """The running means and variances of its batch norms."""
    return [buffer.contiguous() for buffer in net.buffers() if buffer.is_floating_point()]


def agree(alone, stacked, *, tolerance=2e-4):
    for (expected, logits, running), (found, others, their_running) in zip(alone, stacked, strict=True):
        assert [epoch.number for epoch in found] == [epoch.number for epoch in expected]
        for one, other in zip(expected, found, strict=True):
            assert other.learning_rate == one.learning_rate
            for name in ("train_loss", "valid_loss"):
                assert other.scores[name] == pytest.approx(one.scores[name], abs=tolerance), name
        torch.testing.assert_close(others, logits, atol=50 * tolerance, rtol=50 * tolerance)
        torch.testing.assert_close(their_running, running, atol=50 * tolerance, rtol=50 * tolerance)
