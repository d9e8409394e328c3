"""A parameter as a function of another one: the value that is drawn, and the one that is used."""

import pytest

from hpo.report.text import parameter_names, range_text
from hpo.spec.study import StudySpec

LR, BATCH = "training.optimizer.lr", "training.batch_size"
RELATIVE = {"float": [0.001, 0.1], "log": True, "per": BATCH, "reference": 64}


def _spec(space, **places):
    tree = {
        "name": "relative",
        "data": {"name": "digits"},
        "model": {"kind": "mlp"},
        "training": {"batch_size": 32},
        "search": {"space": space},
    }
    return StudySpec.model_validate(tree | places)


@pytest.mark.parametrize(("batch", "expected"), [(64, 0.02), (128, 0.04), (16, 0.005)])
def test_a_learning_rate_is_used_in_proportion_to_the_batch(batch, expected):
    spec = _spec({LR: RELATIVE, BATCH: {"choice": [16, 64, 128]}})
    setup = spec.with_values({LR: 0.02, BATCH: batch})
    assert setup.training.optimizer.lr == pytest.approx(expected, rel=1e-12)
    assert setup.flat()[LR] == setup.training.optimizer.lr  # as it is logged with the trial


def test_the_other_place_may_be_fixed():
    assert _spec({LR: RELATIVE}).with_values({LR: 0.02}).training.optimizer.lr == pytest.approx(0.01)


def test_values_of_the_final_training_are_used_as_they_are():
    spec = _spec({LR: RELATIVE})
    assert spec.with_values({LR: 0.02}, fixed={LR: 0.5}).training.optimizer.lr == 0.5
    # A larger batch in the final training raises the rate with it.
    assert spec.with_values({LR: 0.02}, fixed={BATCH: 640}).training.optimizer.lr == pytest.approx(0.2)


def test_both_ends_are_tried_with_both_ends_of_the_other():
    with pytest.raises(ValueError, match=r"lr=102.4, training.batch_size=65536 does not fit"):
        _spec({LR: RELATIVE, BATCH: {"int": [32, 65536]}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": None}, "per and reference belong together"),
        ({"per": None}, "per and reference belong together"),
        ({"reference": 0}, "greater than 0"),
        ({"per": "training.batches"}, "there is no 'batches' there"),
        ({"per": "training.precision"}, "is not a positive number of its own"),
        ({"per": LR}, "is not a positive number of its own"),
    ],
)
def test_what_has_no_number_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        _spec({LR: RELATIVE | changes})


def test_the_reference_belongs_to_the_identity_of_a_study():
    plain = {key: RELATIVE[key] for key in ("float", "log")}
    one, two, three = (_spec({LR: each}).identity() for each in (plain, RELATIVE, RELATIVE | {"reference": 32}))
    assert one != two != three


def test_the_drawn_value_is_shown_as_what_it_is():
    ranges = {LR: RELATIVE, BATCH: {"choice": [16, 64]}}
    assert parameter_names(ranges, ranges) == {LR: "lr*64/batch_size", BATCH: "batch_size"}
    assert range_text(_spec({LR: RELATIVE}).search.space[LR]).endswith("times training.batch_size / 64")
