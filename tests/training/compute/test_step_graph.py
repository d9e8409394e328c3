"""Captured steps, on the CPU: a stand-in of the CUDA graph, which replays by computing again what was captured."""

import copy
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from hpo.models import build_model
from hpo.spec.models import MlpSpec
from hpo.spec.training import AugmentSpec, OptimizerSpec
from hpo.training import step_graph
from hpo.training.device import Graph
from hpo.training.loop import train
from hpo.training.stack import Stack
from hpo.training.step_graph import StepGraph, why_not
from side_by_side import agree, stacked, training

CALM = OptimizerSpec(name="sgd", lr=0.05, momentum=0.9)


class Replayed:
    """What was captured is the method _once of its owner, with learning rates that are tensors."""

    replays = 0
    wrong = False

    def replay(self):
        type(self).replays += 1
        groups, rates = self.owner._groups, [group["lr"] for group in self.owner._groups]
        for group, captured in zip(groups, self.owner._rate.unbind(), strict=True):
            group["lr"] = captured
        for _ in range(1 + self.wrong):
            self.owner._once()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate

    def register_generator_state(self, generator):
        pass


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    Replayed.replays, Replayed.wrong = 0, False
    stream = SimpleNamespace(wait_stream=lambda _: None)

    @contextmanager
    def capture(graph, **_):
        # Nothing is computed while a graph is captured: its state is put back.
        owner = next(each for each in made if each._graph is graph)
        graph.owner = owner
        kept = [(value, value.detach().clone()) for value in watched(owner)]
        yield
        for value, before in kept:
            value.detach().copy_(before)

    def watched(owner):
        moments = [value for state in states(owner) for value in state.values() if isinstance(value, torch.Tensor)]
        return [owner._at, owner._rate, *owner._kept_by_test, *moments]

    def states(owner):
        return [state for optimizer in owner._optimizers_by_test for state in optimizer.state.values()]

    made = []
    original = StepGraph._capture

    def capturing(self, before, kept, generators):
        made.append(self)
        self._kept_by_test, self._optimizers_by_test = kept, before._optimizers
        original(self, before, kept, generators)

    monkeypatch.setattr(StepGraph, "_capture", capturing)
    for name, value in {
        "CUDAGraph": Replayed,
        "graph": capture,
        "device": lambda _: nullcontext(),
        "stream": lambda _: nullcontext(),
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "get_rng_state": lambda _: torch.get_rng_state(),
        "set_rng_state": lambda state, _: torch.set_rng_state(state),
    }.items():
        monkeypatch.setattr(step_graph.torch.cuda, name, value)
    monkeypatch.setattr(step_graph, "_ON", "cpu")


def _net(seed=0):
    model = MlpSpec(kind="mlp", hidden=[24, 16], dropout=0.2, batch_norm=True)
    return build_model(model, image_shape=(8, 8, 1), classes=10, seed=seed)


def _spec(**fields):
    return training(**{"epochs": 5, "optimizer": CALM, "schedule": {"name": "one_cycle"}, "clip_norm": 1.0, **fields})


def _scores(epochs):
    return [(epoch.scores, epoch.learning_rate) for epoch in epochs]


def test_captured_steps_learn_what_eager_ones_learn(digits):
    expected = _scores(train(_net(), digits, _spec(), seed=1, precision="float32"))
    graph = Graph(None, torch.Size(), "whole steps", whole=True)
    found = _scores(train(_net(), digits, _spec(), seed=1, precision="float32", graph=graph))
    assert graph.how == "whole steps"
    assert found == expected
    full = len(digits.train) // 32
    assert Replayed.replays == 5 * full + 2  # two of the capture's trial


def test_a_training_that_was_cut_short_ends_as_one_that_was_not(digits):
    graphs = [Graph(None, torch.Size(), "whole steps", whole=True) for _ in range(3)]
    saved = []
    spec = _spec(checkpoint=1)

    def fit(graph, **more):
        return train(_net(), digits, spec, seed=1, precision="float32", graph=graph, **more)

    whole = _scores(fit(graphs[0]))
    cut = fit(graphs[1], save=lambda _, state: saved.append(copy.deepcopy(state)))
    for _ in range(3):
        next(cut)
    cut.close()
    assert _scores(fit(graphs[2], resume=saved[1])) == whole[2:]


def test_a_stack_of_captured_steps_learns_what_its_members_learn_without(digits, monkeypatch):
    ways = [{}, {"schedule": {"name": "cosine"}}, {"optimizer": OptimizerSpec(name="sgd", lr=0.01)}]
    makers = [(_net, _spec(**way)) for way in ways]
    with monkeypatch.context() as without:
        without.setattr(step_graph, "_ON", "cuda")
        expected = stacked(makers, digits)
    assert not Replayed.replays
    agree(expected, stacked(makers, digits), tolerance=1e-5)
    assert Replayed.replays == 5 * (len(digits.train) // 32) + 2


def test_a_graph_that_computes_otherwise_is_not_used_and_leaves_nothing(digits):
    expected = _scores(train(_net(), digits, _spec(), seed=1, precision="float32"))
    Replayed.wrong = True  # each step twice
    graph = Graph(None, torch.Size(), "whole steps", whole=True)
    assert _scores(train(_net(), digits, _spec(), seed=1, precision="float32", graph=graph)) == expected
    assert graph.how == "eager: RuntimeError: a graph of its steps leaves other weights"
    stack = Stack(precision="float32")
    member = stack.join(_net(), digits, _spec(), seed=1)
    assert [next(member), next(member)][1].number == 1
    assert stack.not_captured == "RuntimeError: a graph of its steps leaves other weights"


def test_a_graph_that_does_nothing_is_noticed_where_steps_are_tiny(digits):
    Replayed.wrong = -1  # no step at all
    graph = Graph(None, torch.Size(), "whole steps", whole=True)
    tiny = _spec(optimizer=OptimizerSpec(name="sgd", lr=1e-6))
    next(train(_net(), digits, tiny, seed=1, precision="float32", graph=graph))
    assert graph.how == "eager: RuntimeError: a graph of its steps leaves other weights"


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ({}, ""),
        ({"augment": AugmentSpec(flip_horizontal=True)}, ""),
        ({"augment": AugmentSpec(rotate=20.0)}, "its images are changed at random"),
        ({"augment": AugmentSpec(mixup=0.4)}, "its images are changed at random"),
        ({"ema": 0.9}, "it averages its weights"),
        ({"micro_batch": 8}, "its batches are computed in pieces"),
        ({"data_growth": 0.5}, "its data grows"),
        ({"loss": "own:loss"}, "it runs code of your own"),
        ({"batch_size": 256}, "an epoch has fewer than 16 full batches"),
        ({"epochs": 2}, "it has fewer than 160 full batches to learn from"),
    ],
)
def test_what_cannot_be_captured_says_why(digits, way, reason):
    assert why_not(_net(), digits, _spec(**way), own=False) == reason
