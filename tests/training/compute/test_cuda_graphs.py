"""A captured step is taken only where it is right and faster; stand-ins capture where there is no GPU."""

import copy
import time

import pytest
import torch
from torch import nn
from torch.func import functional_call

from hpo.models import build_model
from hpo.spec.models import CnnSpec
from hpo.spec.training import AugmentSpec, OptimizerSpec, TrainingSpec
from hpo.training.device import agree, choose_graph
from hpo.training.loop import train

SPEC = TrainingSpec(epochs=30, batch_size=32, optimizer=OptimizerSpec(lr=3e-3))


def _spend(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


class Launched(nn.Module):
    """A network whose every call takes a little longer, as a GPU has to be told what to do."""

    def __init__(self, net):
        super().__init__()
        self.net, self.waits = net, True

    def forward(self, images):
        _spend(0.003 * self.waits)
        return self.net(images)


def _net(seed=0, **fields):
    model = CnnSpec(kind="cnn", **{"filters": 4, "batch_norm": True, "dropout": 0.3, **fields})
    return Launched(build_model(model, image_shape=(8, 8, 1), classes=10, seed=seed))


def _right(step, sample):
    step(sample)  # a capture warms up: it draws, and moves running means

    def forward(inputs):
        step.net.waits = False
        logits = step(inputs)
        step.net.waits = True
        return logits

    return forward


def _slow(step, sample):
    def forward(inputs):
        _spend(0.004)
        return step(inputs)

    return forward


def _scaled(step, sample):
    return lambda inputs: 2 * step.net.net(inputs)


def _same_inputs(step, sample):
    return lambda inputs: step.net.net(sample)


def _same_weights(step, sample):
    kept = copy.deepcopy(step.net.net)
    first = dict(step.net.net.named_parameters())

    def forward(inputs):
        # Values of the capture, gradients to the weights of today.
        weights = {name: weight + (kept.get_parameter(name) - weight).detach() for name, weight in first.items()}
        return functional_call(step.net.net, weights, inputs)

    return forward


def _no_statistics(step, sample):
    def forward(inputs):
        buffers = {name: buffer.clone() for name, buffer in step.net.net.named_buffers()}
        return functional_call(step.net.net, buffers, inputs)

    return forward


def _raises(step, sample):
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


@pytest.mark.parametrize(
    ("grapher", "how"),
    [
        (_right, "graph"),
        (_slow, "eager: with a graph a step is 0."),
        (_scaled, "eager: a graph of it leaves other gradients"),
        (_same_inputs, "eager: a graph of it leaves other gradients"),
        (_same_weights, "eager: a graph of it leaves other gradients"),
        (_no_statistics, "eager: a graph of it leaves other gradients"),
        (_raises, "eager: RuntimeError: operation not permitted when stream is capturing"),
    ],
    ids=lambda part: getattr(part, "__name__", ""),
)
@pytest.mark.parametrize("precision", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_a_graph_is_taken_only_where_it_is_right_and_faster(few, grapher, how, precision):
    net = _net().eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    chance = torch.get_rng_state()
    graph = choose_graph(net, few, SPEC, precision=precision, grapher=grapher)
    assert graph.how.startswith(how)
    assert "\n" not in graph.how
    assert (graph.forward is None) == (how != "graph")
    # Whatever was tried, nothing of it is left.
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), chance)
    assert not net.training
    assert all(weight.grad is None for weight in net.parameters())


@pytest.mark.parametrize("kernel", [1, 3])
def test_weights_lie_where_they_were_captured(few, kernel):
    net = _net(kernel=kernel)
    graph = choose_graph(net, few, SPEC, precision="bfloat16", grapher=_right)
    assert graph.forward is not None
    places = [weight.data_ptr() for weight in net.parameters()]
    fit = train(net, few, SPEC, seed=0, precision="bfloat16", graph=graph)
    next(fit)
    assert [weight.data_ptr() for weight in net.parameters()] == places
    fit.close()


@pytest.mark.parametrize(
    ("fields", "own", "reason"),
    [
        ({}, True, "a network of your own"),
        ({"micro_batch": 8}, False, "in pieces"),
        ({"epochs": 2}, False, "fewer than 200 full batches"),
        ({"batch_size": 512}, False, "fewer than 200 full batches"),
    ],
)
def test_what_a_graph_cannot_repeat_is_not_captured(few, fields, own, reason):
    spec = SPEC.model_copy(update=fields)
    graph = choose_graph(_net(), few, spec, precision="float32", own=own, grapher=_right)
    assert graph.forward is None
    assert reason in graph.how


@pytest.mark.parametrize("fields", [{}, {"augment": AugmentSpec(mixup=0.4)}, {"clip_norm": 1.0, "ema": 0.9}], ids=str)
def test_a_training_with_a_graph_is_the_training_without(few, fields):
    spec, shapes = SPEC.model_copy(update=fields), []
    expected = list(train(_net(), few, spec.model_copy(update={"epochs": 2}), seed=1, precision="float32"))

    def watched(step, sample):
        def forward(inputs):
            shapes.append(len(inputs))
            return step.net.net(inputs)

        return forward

    net = _net()
    graph = choose_graph(net, few, spec, precision="float32", grapher=watched)
    assert graph.how == "graph"
    shapes.clear()
    brief = spec.model_copy(update={"epochs": 2})
    found = list(train(net, few, brief, seed=1, precision="float32", graph=graph))
    assert shapes == [32] * 20  # the last batch, of 10, is not the graph's
    for one, other in zip(expected, found, strict=True):
        assert other.scores == pytest.approx(one.scores, abs=1e-5)


def test_gradients_of_pure_rounding_may_differ_and_others_may_not():
    large, tiny = torch.ones(100), torch.full((3,), 1e-9)
    assert agree([large, tiny, None], [large * 1.001, -tiny, None], tolerance=0.01)
    assert not agree([large, tiny], [large, tiny + 0.1], tolerance=0.01)
    assert not agree([large, tiny], [large, None], tolerance=0.01)
    assert not agree([large], [large * float("nan")], tolerance=0.01)
