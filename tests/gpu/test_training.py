"""Networks on a GPU learn what they learn on the CPU, alone, stacked and captured, and no step waits for the GPU."""

import re
import warnings
from dataclasses import replace

import pytest
import torch

from device_cases import CNN, FAMILIES, MLP, SIDE, TRAININGS, images, learn
from hpo.data.prepare import open_trial
from hpo.models import build_model
from hpo.models.saliency import METHODS, saliency
from hpo.spec.models import CnnSpec, MlpSpec
from hpo.spec.study import SplitSpec
from hpo.spec.training import OptimizerSpec, TrainingSpec
from hpo.training.device import Graph, capture_cuda, choose_graph
from hpo.training.loop import train
from hpo.training.optimizers import OPTIMIZERS
from hpo.training.step_graph import StepGraph, why_not
from side_by_side import agree, alone, stacked, training

pytestmark = pytest.mark.gpu
TOLERANCE = {"float32": 0.02, "bfloat16": 0.06}
CALM = {"name": "sgd", "lr": 0.01}  # the others make whole steps of what is only rounding


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch):
    """Convolutions of float32 would be computed in TF32, of 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def _without_dropout(model):
    return {name: value for name, value in model.items() if name != "dropout"}  # each device draws its own


def _agrees(model, device, precision, **options):
    options = {"optimizer": CALM, **options}
    _, here = learn(_without_dropout(model), "cpu", **options)
    net, there = learn(_without_dropout(model), device, precision=precision, **options)
    assert {tensor.device.type for tensor in net.state_dict().values()} == {torch.device(device).type}
    assert len(there) == len(here)
    # Rounding grows from epoch to epoch.
    assert there[0].scores["train_loss"] == pytest.approx(here[0].scores["train_loss"], rel=TOLERANCE[precision])
    assert all(name in there[-1].scores for name in here[-1].scores)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_each_family_learns_what_it_learns_on_the_cpu(device, kind, precision):
    _agrees({"kind": kind, **FAMILIES[kind]}, device, precision)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_growing_images_teach_what_they_teach_on_the_cpu(device, precision):
    model = {"kind": "convnet", "depth": 2, "width": 6, "head": "global"}
    _agrees(model, device, precision, first_size=0.5, epochs=3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TRAININGS)
def test_each_way_to_train_learns_what_it_learns_on_the_cpu(device, name, precision):
    options = TRAININGS[name]
    if name.startswith("optimizer"):
        options = {"optimizer": {**options["optimizer"], "lr": 1e-4}}
    _agrees(CNN, device, precision, **options)


@pytest.mark.parametrize(
    "model",
    [
        MlpSpec(kind="mlp", hidden=[32, 16], batch_norm=True),
        CnnSpec(kind="cnn", filters=6, batch_norm=True),
    ],
    ids=lambda model: model.kind,
)
def test_stacks_equal_single_trainings(few, device, model):
    there = _moved(few, device)
    ways = [{}, {"augment": {"flip_horizontal": True, "rotate": 20.0}}, {"ema": 0.9, "clip_norm": 1.0}]
    makers = [
        (lambda seed: build_model(model, image_shape=(8, 8, 1), classes=10, seed=seed).to(there.images.device), spec)
        for spec in (training(optimizer=OptimizerSpec(**CALM), **way) for way in ways)
    ]
    agree(alone(makers, there), stacked(makers, there), tolerance=5e-3)


def _moved(data, device):
    there = torch.device(device)
    return replace(data, **{name: getattr(data, name).to(there) for name in ("images", "labels", "train", "valid")})


@pytest.mark.parametrize("name", ["optimizer-adamw", "optimizer-timm/muon", "augment-all", "ema", "clip", "focal"])
def test_no_step_waits_for_the_gpu(cuda, name):
    def waits(**options):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                learn(CNN, cuda, **{**TRAININGS[name], **options})
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return [str(one.message) for one in seen if "called a synchronizing" in str(one.message)]

    learn(CNN, cuda, **TRAININGS[name])  # constants are copied once
    few, many = waits(), waits(batch_size=10)
    assert few, "the debug mode tells nothing here"
    assert len(many) == len(few)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "model",
    [MlpSpec(kind="mlp", hidden=64, dropout=0.2), CnnSpec(kind="cnn", filters=8, batch_norm=True)],
    ids=lambda model: model.kind,
)
def test_a_graph_learns_what_is_learned_without(few, cuda, model, precision):
    there = _moved(few, cuda)
    spec = TrainingSpec(epochs=30, batch_size=32, optimizer=OptimizerSpec(lr=3e-3))

    def made():
        return build_model(model, image_shape=(8, 8, 1), classes=10, seed=0).to(torch.device(cuda))

    brief = spec.model_copy(update={"epochs": 2})
    expected = list(train(made(), there, brief, seed=1, precision=precision))
    net = made()
    graph = choose_graph(net, there, spec, precision=precision, grapher=capture_cuda)
    assert not re.search("gradients|Error", graph.how)
    found = list(train(net, there, brief, seed=1, precision=precision, graph=graph))
    for one, other in zip(expected, found, strict=True):
        assert other.scores["train_loss"] == pytest.approx(one.scores["train_loss"], rel=0.02)


NETS = {
    "mlp": MlpSpec(kind="mlp", hidden=[64, 32], dropout=0.2, batch_norm=True),
    "cnn": CnnSpec(kind="cnn", filters=8, batch_norm=True),
}


def _made(name, device, seed=0):
    return build_model(NETS[name], image_shape=(8, 8, 1), classes=10, seed=seed).to(torch.device(device))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", NETS)
def test_captured_steps_learn_what_eager_ones_learn(digits, cuda, name, optimizer, precision):
    there, rate = _moved(digits, cuda), 0.05 if optimizer == "sgd" else 1e-3
    spec = training(
        epochs=5,
        optimizer=OptimizerSpec(name=optimizer, lr=rate, momentum=0.5),
        schedule={"name": "one_cycle"},
        clip_norm=1.0,
        patience=None,
    )
    assert why_not(_made(name, cuda), there, spec, own=False) == ""
    expected = list(train(_made(name, cuda), there, spec, seed=1, precision=precision))
    graph = Graph(None, torch.Size(), "whole steps", whole=True)
    found = list(train(_made(name, cuda), there, spec, seed=1, precision=precision, graph=graph))
    assert graph.how == "whole steps"
    assert [epoch.learning_rate for epoch in found] == [epoch.learning_rate for epoch in expected]
    assert found[0].scores["train_loss"] == pytest.approx(expected[0].scores["train_loss"], rel=TOLERANCE[precision])
    for one, other in zip(expected, found, strict=True):
        assert other.scores["train_loss"] == pytest.approx(one.scores["train_loss"], rel=0.1)
        assert other.scores["train_accuracy"] == pytest.approx(one.scores["train_accuracy"], abs=0.03)


@pytest.mark.parametrize("name", NETS)
def test_a_captured_stack_learns_what_an_eager_one_learns(digits, cuda, name, monkeypatch):
    there, captured = _moved(digits, cuda), []

    def capture(*given, **named):
        captured.append(StepGraph(*given, **named))
        return captured[-1]

    monkeypatch.setattr("hpo.training.stack.StepGraph", capture)
    ways = [{}, {"schedule": {"name": "cosine"}}, {"clip_norm": 1.0, "optimizer": OptimizerSpec(name="adam", lr=1e-3)}]
    makers = [
        (lambda seed: _made(name, cuda, seed), training(epochs=5, **{"optimizer": OptimizerSpec(**CALM), **way}))
        for way in ways
    ]
    with monkeypatch.context() as eager:
        eager.setattr("hpo.training.stack.why_not", lambda *_, **__: "it is compared with")
        expected = stacked(makers, there)
    assert not captured
    agree(expected, stacked(makers, there), tolerance=1e-2)
    assert len(captured) == 1


def test_images_on_the_gpu_are_those_on_the_cpu(digits_card, device):
    split = SplitSpec(kind="holdout")
    host, there = (open_trial(digits_card, split, device=torch.device(name)) for name in ("cpu", device))
    assert there.images.device == there.train.device == torch.device(device)
    assert torch.equal(host.images, there.images.cpu())
    assert (host.mean, host.std) == (there.mean, there.std)


def test_bfloat16_learns_the_digits(digits, device):
    net = build_model(MlpSpec(kind="mlp", hidden=64), image_shape=(8, 8, 1), classes=10, seed=0)
    spec = TrainingSpec(epochs=3, batch_size=32, optimizer=OptimizerSpec(lr=3e-3))
    epochs = list(train(net.to(torch.device(device)), _moved(digits, device), spec, seed=0, precision="bfloat16"))
    assert epochs[-1].scores["valid_accuracy"] > 0.85


@pytest.mark.parametrize("method", METHODS)
def test_saliency_is_that_of_the_cpu(device, method):
    net = learn(CNN, "cpu")[0].eval()
    image = images("cpu").images[0].permute(2, 0, 1).float() / 255
    here = saliency(net, image, 1, method)
    there = saliency(net.to(torch.device(device)), image.to(torch.device(device)), 1, method)
    assert here.shape == there.shape == (SIDE, SIDE)
    assert abs(here - there).max() <= 0.05 * abs(here).max()


def test_an_mlp_of_every_activation_has_no_part_on_the_cpu(device):
    for activation in ("relu", "gelu", "tanh"):
        _agrees({**MLP, "activation": activation}, device, "float32")
