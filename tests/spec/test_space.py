"""Search spaces: grids, conditions, and candidates made of them."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpo.errors import SpecError
from hpo.spec.grid import holds
from hpo.spec.load import load_study
from hpo.spec.space import Float, Int, Space


def test_a_float_with_a_step_has_a_finite_grid_that_ends_at_high():
    assert Float(float=(0.0, 0.5), step=0.1).grid() == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]


@given(low=st.integers(-50, 50), span=st.integers(0, 100), step=st.integers(1, 7))
def test_an_int_grid_stays_in_its_range_and_on_its_steps(low, span, step):
    grid = Int(int=(low, low + span), step=step).grid()
    assert grid[0] == low
    assert low + span - step < grid[-1] <= low + span
    assert all(after - before == step for before, after in itertools.pairwise(grid))


def test_a_conditional_parameter_is_absent_from_cells_where_its_condition_fails():
    space = Space(
        {
            "momentum": {"choice": [0.0, 0.9], "when": {"optimizer": ["sgd"]}},
            "optimizer": {"choice": ["sgd", "adam"]},
        }
    )
    cells = list(space.cells({}))
    assert cells == [
        {"optimizer": "sgd", "momentum": 0.0},
        {"optimizer": "sgd", "momentum": 0.9},
        {"optimizer": "adam"},
    ]
    assert space.size({}) == 3


def test_a_condition_may_name_a_fixed_place():
    space = Space({"momentum": {"choice": [0.0, 0.9], "when": {"optimizer": "sgd"}}})
    assert space.size({"optimizer": "sgd"}) == 2
    assert list(space.cells({"optimizer": "adam"})) == [{}]


def test_a_continuous_space_has_no_size():
    assert Space({"lr": {"float": [0.1, 1.0]}}).size({}) is None


def test_a_missing_value_never_satisfies_a_condition():
    assert not holds({"a": None}, {})
    assert holds({"a": [1, 2]}, {"a": 2})


def test_a_candidate_is_the_spec_with_its_places_filled_in():
    spec = load_study("digits-mlp")
    setup = spec.with_values({"model.hidden": 77, "training.optimizer.name": "sgd"})
    assert setup.model.hidden == 77
    assert setup.training.optimizer.name == "sgd"
    assert setup.training.epochs == spec.training.epochs


def test_a_candidate_outside_the_spec_is_refused():
    with pytest.raises(SpecError, match=r"model\.dropout=2"):
        load_study("digits-mlp").with_values({"model.dropout": 2})


def test_a_start_that_is_not_finite_is_refused():
    space = {"search.space": {"training.optimizer.lr": {"float": [0.001, 0.1]}}}
    starts = [{"training.optimizer.lr": lr} for lr in (0.01, float("inf"))]
    with pytest.raises(SpecError, match=r"search\.start\[1\]\.training\.optimizer\.lr: inf is not finite"):
        load_study("digits-mlp", overrides={**space, "search.start": starts})


def test_seeds_differ_between_ordinals_and_between_studies():
    one = load_study("digits-mlp")
    other = one.model_copy(update={"seed": 1})
    seeds = [one.seed_of(ordinal) for ordinal in range(100)] + [other.seed_of(ordinal) for ordinal in range(100)]
    assert len(set(seeds)) == 200
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_moved_data_file_leaves_the_identity_of_a_study():
    here = load_study("digits-mlp", overrides={"data.path": "a.npz"})
    there = load_study("digits-mlp", overrides={"data.path": "b.npz"})
    assert here.identity() == there.identity()
    assert here.identity() != load_study("digits-mlp", overrides={"training.epochs": 3}).identity()
