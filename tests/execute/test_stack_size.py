"""How many trials share a worker."""

import pytest

from hpo.execute.stack_size import largest_stack, measure_stack_size
from hpo.spec.load import load_study


def _spec(*settings):
    return load_study("digits-mlp", overrides=list(settings))


@pytest.mark.parametrize(
    ("sampler", "left", "workers", "by_default", "most"),
    [
        ("random", 40, 2, True, 20),
        ("grid", 40, 2, True, 20),
        ("random", 40, 1, True, 40),
        ("random", 40, 1, False, 1),  # asked for one worker: nothing depends on a clock
        ("tpe", 40, 2, True, 4),  # a fifth of what is left is under way
        ("tpe", 40, 2, False, 4),
        ("tpe", 40, 1, True, 8),
        ("tpe", 40, 1, False, 1),
        ("tpe", 3, 2, True, 1),
    ],
)
def test_samplers_that_learn_have_few_trials_under_way(sampler, left, workers, by_default, most):
    spec = _spec(f"search.sampler={sampler}", "search.space={model.hidden: {choice: [8, 16]}}")
    assert largest_stack(spec, left=left, workers=workers, by_default=by_default) == most


def test_the_measurement_chooses_a_number_within_the_limit(card):
    places = measure_stack_size(_spec(), card, "cpu", threads=1, most=6)
    assert places.count in (1, 4)
    assert bool(places.reason) == (places.count == 1)


@pytest.mark.parametrize(
    ("settings", "most", "reason"),
    [
        ((), 1, "few trials are left"),
        (("model={kind: resnet, width: 4}",), 8, "a layer ResidualBlock"),
        (("model={kind: cnn, filters: 512, kernel: 5}",), 8, "all of it computing"),
        (("training.checkpoint=2",), 8, "it saves checkpoints"),
    ],
)
def test_what_cannot_share_says_why(card, settings, most, reason):
    spec = _spec("search.space={training.optimizer.lr: {choice: [0.1]}}", *settings)
    places = measure_stack_size(spec, card, "cpu", threads=1, most=most)
    assert places.count == 1
    assert reason in places.reason
