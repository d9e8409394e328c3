"""One sigmoid output as two logits: the same probabilities, the same loss, the same gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from hpo.errors import TrainingError
from hpo.models import build_model, parameter_count
from hpo.models.basic import OneLogit
from hpo.spec.models import ConvnetSpec, MlpSpec


def test_the_binary_network_of_128_neurons_has_its_published_size():
    net = build_model(MlpSpec(kind="mlp"), image_shape=(28, 28, 1), classes=2, seed=0, binary=True)
    assert parameter_count(net) == 784 * 128 + 128 + 129 == 100_609


def test_cross_entropy_of_the_two_logits_is_binary_cross_entropy_of_the_one():
    torch.manual_seed(0)
    inner = nn.Linear(5, 1)
    features, labels = torch.randn(64, 5) * 4, torch.randint(2, (64,))

    two = functional.cross_entropy(OneLogit(inner)(features), labels)
    (gradient_two,) = torch.autograd.grad(two, [inner.weight])
    one = nn.BCEWithLogitsLoss()(inner(features).squeeze(1), labels.float())
    (gradient_one,) = torch.autograd.grad(one, [inner.weight])

    torch.testing.assert_close(two, one)
    torch.testing.assert_close(gradient_two, gradient_one)


def test_probability_of_the_second_class_is_the_sigmoid():
    z = torch.tensor([[-30.0], [-1.0], [0.0], [2.5], [30.0]])
    logits = OneLogit(nn.Identity())(z)
    torch.testing.assert_close(logits.softmax(1)[:, 1], z.sigmoid().squeeze(1))
    assert logits.argmax(1).tolist() == [0, 0, 0, 1, 1]


def test_more_than_two_classes_are_refused():
    with pytest.raises(TrainingError, match="separates 2 classes, not 10"):
        build_model(MlpSpec(kind="mlp"), image_shape=(8, 8, 1), classes=10, seed=0, binary=True)


def test_the_binary_head_exports_for_any_number_of_images():
    net = build_model(ConvnetSpec(kind="convnet", depth=1), image_shape=(8, 8, 1), classes=2, seed=0, binary=True)
    batch = torch.export.Dim("batch", min=1, max=1000)
    program = torch.export.export(net.eval(), (torch.rand(2, 1, 8, 8),), dynamic_shapes=({0: batch},))
    images = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(program.module()(images), net(images))
