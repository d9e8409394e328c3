"""A teacher's probabilities are learned with the labels: the loss of Hinton et al. 2015, row by row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hpo.models import build_model
from hpo.spec.models import MlpSpec
from hpo.spec.training import TrainingSpec
from hpo.training.loop import train
from hpo.training.optimizers import Loss, cooled
from hpo.training.stack_layers import unstackable_reason

MODEL = MlpSpec(kind="mlp", hidden=16)


@pytest.fixture
def taught(few):
    generator = torch.Generator().manual_seed(0)
    return replace(few, taught=torch.rand(len(few.images), 10, generator=generator).softmax(1))


def test_the_loss_is_the_mean_of_both_losses_by_their_weight(taught):
    spec = TrainingSpec(teacher="models:/m-1", teacher_weight=0.7, teacher_temperature=3.0)
    loss, rows = Loss(spec, taught), taught.train[:16]
    logits = torch.randn(16, 10, generator=torch.Generator().manual_seed(1))
    targets = loss.targets(rows)
    assert torch.equal(loss.labels(targets), taught.labels[rows])
    own = torch.nn.functional.cross_entropy(logits, taught.labels[rows])
    powers = taught.taught[rows] ** (1 / 3)
    soft = powers / powers.sum(1, keepdim=True)
    expected = 0.3 * own - 0.7 * 9 * (soft * (logits / 3).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss(logits, targets), expected)


def test_labels_that_are_several_are_cooled_one_by_one():
    found = cooled(torch.tensor([[0.5, 0.9]]), 2.0, several=True)
    torch.testing.assert_close(found, torch.tensor([[0.5, 3.0 / 4.0]]))


def test_a_training_without_a_teacher_is_unchanged_and_one_with_a_teacher_is_another(few, taught):
    def weights(data, **settings):
        spec = TrainingSpec(epochs=1, batch_size=32, precision="float32", **settings)
        net = build_model(MODEL, image_shape=(8, 8, 1), classes=10, seed=0)
        list(train(net, data, spec, seed=0, precision="float32"))
        return torch.cat([weight.detach().flatten() for weight in net.parameters()])

    alone = weights(few)
    assert torch.equal(alone, weights(few, teacher_weight=0.5))
    with_teacher = weights(taught, teacher="models:/m-1", augment={"mixup": 0.4})
    assert not torch.equal(alone, with_teacher)
    # In pieces, the gradients of a batch add up to the same.
    pieces = weights(taught, teacher="models:/m-1", augment={"mixup": 0.4}, micro_batch=8)
    torch.testing.assert_close(pieces, with_teacher, atol=1e-4, rtol=1e-3)


def test_a_training_with_a_teacher_is_not_stacked(few):
    net = build_model(MODEL, image_shape=(8, 8, 1), classes=10, seed=0)
    assert unstackable_reason(net, few, TrainingSpec(teacher="a")) == "it learns from a teacher"
    assert not unstackable_reason(net, few, TrainingSpec())
