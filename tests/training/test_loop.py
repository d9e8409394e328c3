"""One training: what it yields, keeps and refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hpo.errors import TrainingError
from hpo.metrics import scores
from hpo.models import build_model
from hpo.records import best_of
from hpo.spec.models import CnnSpec, MlpSpec
from hpo.spec.training import AugmentSpec, OptimizerSpec, ScheduleSpec, TrainingSpec
from hpo.training.loop import predict_logits, train
from hpo.training.optimizers import build_optimizer, class_weights, learning_rate_factor

MLP = MlpSpec(kind="mlp", hidden=32)


def _net(data, spec=MLP, seed=0):
    return build_model(spec, image_shape=tuple(data.images.shape[1:]), classes=len(data.class_names), seed=seed)


def _run(data, training, *, model=MLP, seed=0, precision="float32"):
    net = _net(data, model, seed)
    return net, list(train(net, data, training, seed=seed, precision=precision))


@pytest.mark.parametrize("name", ["sgd", "rmsprop", "adam", "adamw"])
def test_every_optimizer_learns_the_digits(digits, name):
    lr = 0.1 if name == "sgd" else 3e-3
    optimizer = OptimizerSpec(name=name, lr=lr, momentum=0.9 if name == "sgd" else 0.0, nesterov=True)
    _, epochs = _run(digits, TrainingSpec(epochs=4, optimizer=optimizer))
    assert [epoch.number for epoch in epochs] == [1, 2, 3, 4]
    assert epochs[-1].scores["valid_accuracy"] > 0.85
    assert epochs[-1].scores["train_loss"] < epochs[0].scores["train_loss"]


def test_the_same_seed_trains_bit_for_bit_alike(digits):
    spec = TrainingSpec(epochs=2, augment=AugmentSpec(flip_horizontal=True))
    model = MlpSpec(kind="mlp", hidden=32, dropout=0.3)
    (first, a), (second, b), (third, _) = (_run(digits, spec, model=model, seed=seed) for seed in (1, 1, 2))
    assert [epoch.scores for epoch in a] == [epoch.scores for epoch in b]
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(next(first.parameters()), next(third.parameters()))


def test_the_best_epochs_weights_are_kept(digits):
    # A learning rate this high jumps about: the last epoch is not the best.
    spec = TrainingSpec(epochs=8, optimizer=OptimizerSpec(name="sgd", lr=1.5), monitor="valid_loss")
    net, epochs = _run(digits, spec)
    best = best_of(tuple(epochs), "valid_loss")
    measured = scores(predict_logits(net, digits, digits.valid, precision="float32"), digits.labels[digits.valid])
    assert best.number != epochs[-1].number
    assert measured["loss"] == pytest.approx(best.scores["valid_loss"], abs=1e-6)


def test_early_stopping_waits_for_patience_epochs_without_a_better_one(digits):
    spec = TrainingSpec(epochs=50, patience=2, optimizer=OptimizerSpec(name="adam", lr=0.03), monitor="valid_loss")
    _, epochs = _run(digits, spec)
    best = best_of(tuple(epochs), "valid_loss")
    assert len(epochs) < 50
    assert epochs[-1].number == best.number + 2


def test_a_loss_that_is_not_finite_ends_the_training_with_its_reason(digits):
    spec = TrainingSpec(epochs=3, optimizer=OptimizerSpec(name="sgd", lr=100.0, momentum=0.99))
    with pytest.raises(TrainingError, match=r"loss (nan|inf)"):
        _run(digits, spec, model=MlpSpec(kind="mlp", hidden=[64, 64, 64]))


def test_a_batch_of_one_image_does_not_stop_batch_norm(digits):
    count = len(digits.train)
    size = next(size for size in range(2, count) if count % size == 1)
    spec = TrainingSpec(epochs=1, batch_size=size)
    _, epochs = _run(digits, spec, model=MlpSpec(kind="mlp", hidden=8, batch_norm=True))
    assert len(epochs) == 1


def test_batches_of_one_image_train_where_they_are_asked_for(digits):
    few = replace(digits, train=digits.train[:60])
    _, epochs = _run(few, TrainingSpec(epochs=2, batch_size=1, optimizer=OptimizerSpec(lr=1e-3)))
    assert epochs[1].scores["train_loss"] < epochs[0].scores["train_loss"]


def test_bfloat16_trains_as_well(digits):
    model = CnnSpec(kind="cnn", filters=8)
    _, epochs = _run(digits, TrainingSpec(epochs=3), model=model, precision="bfloat16")
    assert epochs[-1].scores["valid_accuracy"] > 0.6


def test_balanced_class_weights_are_those_of_scikit_learn():
    from sklearn.utils.class_weight import compute_class_weight

    labels = torch.tensor([0] * 7 + [1] * 2 + [2])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    assert class_weights(labels, 3).tolist() == pytest.approx(expected.tolist())


def test_label_smoothing_and_class_weights_change_the_training_loss_only(digits):
    plain, smooth = (
        _run(digits, TrainingSpec(epochs=1, label_smoothing=value, optimizer=OptimizerSpec(lr=1e-12)))[1][0]
        for value in (0.0, 0.5)
    )
    assert plain.scores["valid_loss"] == pytest.approx(smooth.scores["valid_loss"], abs=1e-4)
    assert plain.scores["train_loss"] != pytest.approx(smooth.scores["train_loss"], abs=1e-3)


@pytest.mark.parametrize(
    ("schedule", "step", "factor"),
    [
        (ScheduleSpec(), 99, 1.0),
        (ScheduleSpec(name="cosine"), 50, 0.5),
        (ScheduleSpec(name="cosine", warmup=0.1), 4, 0.5),
        (ScheduleSpec(name="one_cycle"), 29, 1.0),
        (ScheduleSpec(name="one_cycle"), 65, 0.5),
        (ScheduleSpec(name="step", step_epochs=2, gamma=0.1), 45, 0.01),
        (ScheduleSpec(name="exponential", gamma=0.5), 35, 0.125),
    ],
)
def test_schedules_follow_their_formulas(schedule, step, factor):
    assert learning_rate_factor(schedule, step=step, steps=100, epoch=step // 10) == pytest.approx(factor)


def test_frozen_weights_stay_out_of_the_optimizer(digits):
    net = _net(digits)
    next(net.parameters()).requires_grad_(False)
    optimizer = build_optimizer(OptimizerSpec(), net)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3


def _gradients(data, model, **options):
    """Weights after one step of plain gradient descent on one batch of 100."""
    spec = TrainingSpec(epochs=1, batch_size=100, optimizer=OptimizerSpec(name="sgd", lr=0.1), **options)
    few = replace(data, train=data.train[:100])
    net = _net(data, model)
    before = [weight.detach().clone() for weight in net.parameters()]
    list(train(net, few, spec, seed=0, precision="float32"))
    return torch.cat([(new - old).flatten() for new, old in zip(net.parameters(), before, strict=True)]).detach()


@pytest.mark.parametrize("options", [{}, {"class_weights": "balanced"}, {"augment": AugmentSpec(mixup=0.5)}])
def test_pieces_of_a_batch_add_up_to_its_gradient(digits, options):
    whole = _gradients(digits, MLP, **options)
    torch.testing.assert_close(_gradients(digits, MLP, micro_batch=33, **options), whole, atol=1e-6, rtol=1e-4)


def test_a_long_gradient_is_shortened_and_a_short_one_is_left(digits):
    free = _gradients(digits, MLP)
    clipped = _gradients(digits, MLP, clip_norm=0.01)
    assert clipped.norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm(), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(_gradients(digits, MLP, clip_norm=1e6), free)


def test_a_moving_average_of_the_weights_is_what_is_judged_and_kept(digits):
    """Steps this long jump about; their average does not."""
    model = MlpSpec(kind="mlp", hidden=32, batch_norm=True)
    jumpy = {"epochs": 6, "optimizer": OptimizerSpec(name="sgd", lr=2.0), "monitor": "valid_loss"}
    _, plain = _run(digits, TrainingSpec(**jumpy), model=model)
    net, calm = _run(digits, TrainingSpec(**jumpy, ema=0.98), model=model)
    assert calm[-1].scores["valid_loss"] < plain[-1].scores["valid_loss"]
    kept = scores(predict_logits(net, digits, digits.valid, precision="float32"), digits.labels[digits.valid])
    assert kept["loss"] == pytest.approx(best_of(tuple(calm), "valid_loss").scores["valid_loss"], abs=1e-5)


def test_numbers_near_zero_are_left_to_whoever_gets_the_epochs(digits):
    """A flag of the processor makes them zero while a network trains."""
    smallest = np.float64(5e-324)
    for _ in train(_net(digits), digits, TrainingSpec(epochs=2), seed=0, precision="float32"):
        assert smallest * np.float64(1) > 0
    diverging = TrainingSpec(epochs=3, optimizer=OptimizerSpec(name="sgd", lr=100.0, momentum=0.99))
    with pytest.raises(TrainingError):
        _run(digits, diverging, model=MlpSpec(kind="mlp", hidden=[64, 64, 64]))
    assert smallest * np.float64(1) > 0
