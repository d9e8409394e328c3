import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpo.data.split import indices, stratified
from hpo.errors import DataError
from hpo.spec.study import SplitSpec

LABELS = np.array([0] * 50 + [1] * 30 + [2] * 20)


@given(
    counts=st.lists(st.integers(2, 40), min_size=2, max_size=6),
    share=st.floats(0.05, 0.6),
    by=st.sampled_from(["stratified", "random", "order"]),
    seed=st.integers(0, 1000),
)
def test_train_and_valid_part_all_rows_between_them(counts, share, by, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    try:
        train, valid = indices(labels, split=SplitSpec(kind="holdout", share=share, by=by, seed=seed), valid_start=None)
    except DataError:
        return
    assert sorted([*train, *valid]) == list(range(len(labels)))
    assert (np.diff(train) > 0).all()
    assert (np.diff(valid) > 0).all()
    assert set(labels[train]) == set(labels)


@given(counts=st.lists(st.integers(0, 60), min_size=2, max_size=6), share=st.floats(0.05, 0.9), seed=st.integers(0, 99))
def test_stratified_draw_is_within_one_image_of_every_class_share(counts, share, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    if not len(labels):
        return
    drawn = np.bincount(labels[stratified(labels, share=share, seed=seed)], minlength=len(counts))
    for count, taken in zip(counts, drawn, strict=True):
        assert abs(taken - count * share) < 1 or taken == count - 1
        assert taken < count or count == 0


def test_stratified_holdout_keeps_class_shares_and_total():
    _, valid = indices(LABELS, split=SplitSpec(kind="holdout", share=0.1), valid_start=None)
    assert np.bincount(LABELS[valid]).tolist() == [5, 3, 2]


def test_seed_decides_the_draw():
    def draw(seed):
        return indices(LABELS, split=SplitSpec(kind="holdout", seed=seed), valid_start=None)[1].tolist()

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_official_split_is_the_one_the_data_comes_with():
    labels = np.tile([0, 1], 50)
    train, valid = indices(labels, split=SplitSpec(), valid_start=80)
    assert train.tolist() == list(range(80))
    assert valid.tolist() == list(range(80, 100))


def test_holdout_draws_from_official_validation_images_too():
    labels = np.tile([0, 1], 50)
    _, valid = indices(labels, split=SplitSpec(kind="holdout"), valid_start=80)
    assert valid.min() < 80


def test_order_holds_out_the_last_rows():
    _, valid = indices(np.tile([0, 1], 50), split=SplitSpec(kind="holdout", by="order", share=0.3), valid_start=None)
    assert valid.tolist() == list(range(70, 100))


def test_official_split_without_an_official_part_says_how_to_hold_one_out():
    with pytest.raises(DataError, match=r"split\.kind=holdout"):
        indices(LABELS, split=SplitSpec(), valid_start=None)


def test_class_without_training_image_is_refused():
    with pytest.raises(DataError, match="no training image is left of class 2"):
        indices(LABELS, split=SplitSpec(kind="holdout", by="order", share=0.3), valid_start=None)


def test_validation_part_of_one_class_is_refused():
    labels = np.array([0, 1] * 40 + [1] * 20)
    with pytest.raises(DataError, match="fewer than two classes"):
        indices(labels, split=SplitSpec(), valid_start=80)


def test_class_that_only_validation_lacks_is_allowed():
    _, valid = indices(np.array([0, 1, 2] * 20 + [0, 1] * 5), split=SplitSpec(), valid_start=60)
    assert len(valid) == 10


@pytest.mark.parametrize("by", ["stratified", "random", "order"])
@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_folds_are_disjoint_and_together_the_whole_pool(by, fraction):
    labels = np.random.default_rng(1).integers(0, 5, 403)
    split = SplitSpec(kind="kfold", folds=3, by=by, fraction=fraction)
    parts = [indices(labels, split=split, valid_start=300, fold=fold) for fold in range(3)]
    pool = np.sort(np.concatenate([valid for _, valid in parts]))
    assert len(pool) == len(np.unique(pool)) == round(403 * fraction)
    for train, valid in parts:
        assert not np.intersect1d(train, valid).size
        assert np.array_equal(np.union1d(train, valid), pool)


def test_stratified_folds_have_the_class_shares_of_the_whole():
    labels = np.repeat([0, 1, 2], [50, 30, 10])
    split = SplitSpec(kind="kfold", folds=5)
    for fold in range(5):
        _, valid = indices(labels, split=split, valid_start=None, fold=fold)
        assert np.bincount(labels[valid]).tolist() == [10, 6, 2]


def test_without_a_validation_part_everything_trains():
    train, valid = indices(LABELS, split=SplitSpec(kind="none"), valid_start=3)
    assert len(train) == len(LABELS)
    assert not len(valid)
